"""Small model and data set hub on loopback, for the real huggingface_hub and datasets clients.

    with hub_server(tmp_path / "hub") as hub:
        commit = hub.add("model", "org/tiny", model_dir)
        subprocess.run(command, env=os.environ | hub.env(tmp_path / "home"))

It serves what those clients request: repository info, trees, paths, refs, files (ETag, ranges,
redirects of large files), gated and private repositories, and it takes new repositories and
commits, large files through git-lfs. The Xet protocol is not served: `env` switches it off.

huggingface_hub reads HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE when it is imported, so a test sets
them for a process that it starts. `python -m tests.hub DIR` serves a directory from a shell.

On disk, for each repository: `models/org/name/<commit>/<files>` and `refs.json`.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

from tests.hub_handler import Handler
from tests.hub_store import TOKEN, Hub

__all__ = ["TOKEN", "Hub", "hub_server"]


@contextlib.contextmanager
def hub_server(root: Path, *, port: int = 0) -> Iterator[Hub]:
    """Serve the repositories below `root` in a thread; `port` 0 takes a free one."""
    root.mkdir(parents=True, exist_ok=True)
    hub = Hub(root)
    handler = type("HubHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    hub.content_url = f"http://localhost:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="hub", daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def main() -> None:
    """Serve a directory until interrupted; `TYPE:org/name=DIR` adds repositories first."""
    with hub_server(Path(sys.argv[1])) as hub:
        for argument in sys.argv[2:]:
            kind, _, rest = argument.partition(":")
            name, _, directory = rest.partition("=")
            hub.add("dataset" if kind == "dataset" else "model", name, Path(directory))
        print(f"HF_ENDPOINT={hub.url}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
