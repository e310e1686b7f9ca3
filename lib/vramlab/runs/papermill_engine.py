"""A papermill engine that makes a kernel's death and a cell that runs out of time an error in the
notebook.

Papermill's own engine marks every cell "completed" in both cases and raises nothing that a reader
of the notebook would see. Kernels talk over a private socket file: no port, no race for one, and no
warning about encryption.
"""

from __future__ import annotations

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
    """Stops at the first cell that fails, and records why."""

    _kernel_lost = False
    """The kernel is dead or busy, so it cannot be asked for its language."""

    def papermill_execute_cells(self) -> None:
        for index, cell in enumerate(self.nb.cells):
            try:
                self.nb_man.cell_start(cell, index)
                self.execute_cell(cell, index)
            except Exception as error:
                self._record(cell, error)
                self.nb_man.cell_exception(cell, cell_index=index, exception=error)
                break
            finally:
                self.nb_man.cell_complete(cell, cell_index=index)

    def _record(self, cell, error: Exception) -> None:
        """Append the error output that a lost kernel did not write."""
        if isinstance(error, DeadKernelError):
            name, reason = "KernelDied", self._cause_of_death()
        elif isinstance(error, CellTimeoutError):
            name, reason = "CellTimeout", str(error).strip().splitlines()[0]
        else:  # the kernel has written its own output
            return
        self._kernel_lost = True
        output = {"ename": name, "evalue": reason, "traceback": [f"{name}: {reason}"]}
        cell.outputs.append(nbformat.v4.new_output("error", **output))

    def _cause_of_death(self) -> str:
        code = self.km.provisioner.process.poll()
        if code == -signal.SIGKILL:
            return f"{KILLED}, as the operating system does when memory runs out"
        return f"the notebook's process ended by itself, code {code}"

    def execute(self, **kwargs):
        self.reset_execution_trackers()
        with self.setup_kernel(**kwargs):
            self.papermill_execute_cells()
            if not self._kernel_lost:
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
        # a short name: the path of a socket has at most 107 characters
        with tempfile.TemporaryDirectory(prefix="vl-", ignore_cleanup_errors=True) as folder:
            manager = {"transport": "ipc", "connection_file": str(Path(folder) / "k.json")}
            client = HonestClient(
                nb_man,
                kernel_name=kernel_name,
                timeout=execution_timeout,
                startup_timeout=start_timeout,
                log_output=log_output,
                stdout_file=stdout_file,
                stderr_file=stderr_file,
                config=Config({"KernelManager": manager}),
            )
            return client.execute()
