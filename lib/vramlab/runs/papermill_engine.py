"""A papermill engine that says what happened: a kernel that dies or a cell that runs out of time is
an error in the notebook.

Papermill's own marks every cell "completed" in both cases and raises nothing that a reader of the
notebook would see. Kernels talk over a private socket file: no port, no race for one, and no
warning about encryption.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
from pathlib import Path

import nbformat
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine
from traitlets.config import Config

from .folder import KILLED


class HonestClient(PapermillNotebookClient):
    """Stops at the first cell that did not end, and writes down why."""

    _silent = False
    """The kernel is dead or busy: it will not say which language it speaks."""

    def papermill_execute_cells(self) -> None:
        for index, cell in enumerate(self.nb.cells):
            try:
                self.nb_man.cell_start(cell, index)
                self.execute_cell(cell, index)
            except Exception as error:  # CellExecutionError has written its own output
                self._tell(cell, error)
                self.nb_man.cell_exception(cell, cell_index=index, exception=error)
                break
            finally:
                self.nb_man.cell_complete(cell, cell_index=index)

    def _tell(self, cell, error: Exception) -> None:
        self._silent = isinstance(error, DeadKernelError | CellTimeoutError)
        if not self._silent:
            return
        dead = isinstance(error, DeadKernelError)
        name = "KernelDied" if dead else "CellTimeout"
        what = self._how_it_died() if dead else str(error).strip().splitlines()[0]
        cell.outputs.append(
            nbformat.v4.new_output("error", ename=name, evalue=what, traceback=[f"{name}: {what}"])
        )

    def _how_it_died(self) -> str:
        code = self.km.provisioner.process.poll()
        if code == -signal.SIGKILL:
            return f"{KILLED}, as the operating system does when memory runs out"
        return f"the notebook's process ended by itself, code {code}"

    def execute(self, **kwargs):
        self.reset_execution_trackers()
        with self.setup_kernel(**kwargs):
            self.papermill_execute_cells()
            if not self._silent:
                info = self.wait_for_reply(self.kc.kernel_info())
                self.nb.metadata["language_info"] = info["content"]["language_info"]
                self.set_widgets_metadata()
        return self.nb


class HonestEngine(NBClientEngine):
    """`papermill --engine vramlab`, and what a sweep uses."""

    @classmethod
    def execute_managed_notebook(
        cls,
        nb_man,
        kernel_name,
        log_output=False,
        stdout_file=None,
        stderr_file=None,
        start_timeout=120,
        execution_timeout=None,
        **kwargs,
    ):
        kwargs.pop("input_path", None)
        folder = tempfile.mkdtemp(prefix="vl-")  # short: a socket's path has 107 characters at most
        config = Config(
            {"KernelManager": {"transport": "ipc", "connection_file": str(Path(folder) / "k.json")}}
        )
        try:
            client = HonestClient(
                nb_man,
                kernel_name=kernel_name,
                timeout=execution_timeout,
                startup_timeout=start_timeout,
                log_output=log_output,
                stdout_file=stdout_file,
                stderr_file=stderr_file,
                config=config,
            )
            return client.execute()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
