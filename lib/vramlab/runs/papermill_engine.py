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
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine
from traitlets.config import Config

from .folder import KILLED


class HonestClient(PapermillNotebookClient):
    """A client for which a lost kernel is an error of the cell that was running."""

    _kernel_lost = False

    def execute_cell(self, cell, *args, **kwargs):
        """Execute the cell. Raises: CellExecutionError, also when the kernel died or did not end in
        time."""
        try:
            return super().execute_cell(cell, *args, **kwargs)
        except DeadKernelError:
            name, reason = "KernelDied", self._cause_of_death()
        except CellTimeoutError as error:
            name, reason = "CellTimeout", str(error).strip().splitlines()[0]
        self._kernel_lost = True
        output = {"ename": name, "evalue": reason, "traceback": [f"{name}: {reason}"]}
        cell.outputs.append(nbformat.v4.new_output("error", **output))
        raise CellExecutionError(f"{name}: {reason}", name, reason)

    def _cause_of_death(self) -> str:
        code = self.km.provisioner.process.poll()
        if code == -signal.SIGKILL:
            return f"{KILLED}, as the operating system does when memory runs out"
        return f"the notebook's process ended by itself, code {code}"

    def wait_for_reply(self, *args, **kwargs):
        """The kernel's reply to the question for its language, which a lost one does not answer."""
        if self._kernel_lost:
            return {"content": {"language_info": self.nb.metadata.get("language_info", {})}}
        return super().wait_for_reply(*args, **kwargs)


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
