"""Loading by hub id, against a server on this machine that speaks the hub's protocol."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """Model info, file listing and downloads of the folders in `repositories`; counts what was fetched."""

    repositories: ClassVar[dict[str, Path]] = {}
    fetched: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0].strip("/")
        for repo, folder in self.repositories.items():
            if path.startswith(f"api/models/{repo}"):
                return self._send(json.dumps(self._listing(path, repo, folder)).encode(), {"content-type": "application/json"})
            for revision in ("main", COMMIT):
                prefix = f"{repo}/resolve/{revision}/"
                if path.startswith(prefix):
                    return self._file(folder / path.removeprefix(prefix))
        if path.startswith("api/models/locked/") or path.startswith("locked/"):
            return self._send(b"{}", {"x-error-code": "GatedRepo", "x-error-message": "Access is restricted"}, 403)
        return self._send(b"{}", {"x-error-code": "RepoNotFound"}, 404)

    def _listing(self, path: str, repo: str, folder: Path) -> object:
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        names = [str(file.relative_to(folder)) for file in files]
        if "/tree/" in path:
            return [
                {"type": "file", "path": n, "size": f.stat().st_size, "oid": COMMIT} for n, f in zip(names, files, strict=True)
            ]
        siblings = [{"rfilename": name} for name in names]
        return {"id": repo, "modelId": repo, "sha": COMMIT, "private": False, "gated": False, "siblings": siblings, "tags": []}

    def _file(self, file: Path) -> None:
        if not file.is_file():
            return self._send(b"", {"x-error-code": "EntryNotFound", "x-repo-commit": COMMIT}, 404)
        content = file.read_bytes()
        if self.command == "GET":
            self.fetched.append(str(file))
        return self._send(content, {"etag": f'"{hashlib.sha256(content).hexdigest()}"', "x-repo-commit": COMMIT})

    def _send(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


EACH = "import sys; from stepwell.cli.main import main; print([main(command.split()) for command in sys.argv[1:]])"


def stepwell(endpoint: str, home: Path, *commands: str, offline: bool = False) -> tuple[list[int], list[str]]:
    """Commands one after the other, in one process as its start takes longest: exit codes, and the lines of complaint."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment["HF_HUB_OFFLINE"] = "1" if offline else "0"
    line = [sys.executable, "-c", EACH, *commands]
    done = subprocess.run(line, env=environment, cwd=home, capture_output=True, text=True, timeout=120)
    return json.loads(done.stdout.strip().splitlines()[-1]), done.stderr.strip().splitlines()


def test_a_hub_id_is_downloaded_once_and_only_its_safe_parts(hub: str, flux_dev: Path, tmp_path: Path) -> None:
    (flux_dev / "flux1-whole.safetensors").write_bytes(b"24 GB that nobody needs")
    (flux_dev / "transformer" / "evil.bin").write_bytes(b"a pickle")
    Hub.repositories["someone/tiny"] = flux_dev
    Hub.fetched.clear()
    size = "--width 32 --height 32 --num-inference-steps 1 --threads 1"
    codes, said = stepwell(hub, tmp_path, f"generate --prompt star --model-path someone/tiny {size}")
    assert codes == [0], said
    assert list((tmp_path / "outputs").glob("*.png"))
    names = {Path(file).name for file in Hub.fetched}
    assert "diffusion_pytorch_model.safetensors" in names
    assert not names & {"flux1-whole.safetensors", "evil.bin"}
    fetched = len(Hub.fetched)
    codes, said = stepwell(hub, tmp_path, "doctor someone/tiny", offline=True)
    assert codes == [0], said
    assert len(Hub.fetched) == fetched
    (flux_dev / "flux1-whole.safetensors").unlink()
    (flux_dev / "transformer" / "evil.bin").unlink()


def test_ids_that_cannot_be_loaded(hub: str, tmp_path: Path) -> None:
    reasons = {"someone/nothing": "no such repository on the hub", "locked/model": "gated", "x/y/z": "not a hub id"}
    codes, said = stepwell(hub, tmp_path, *(f"generate --prompt star --model-path {model}" for model in reasons))
    assert codes == [2, 2, 2] and len(said) == 3, said
    assert all(model in line and words in line for (model, words), line in zip(reasons.items(), said, strict=True)), said


def test_no_network(tmp_path: Path) -> None:
    codes, said = stepwell("http://127.0.0.1:9", tmp_path, "generate --prompt star --model-path someone/tiny", offline=True)
    assert codes == [2] and len(said) == 1
    assert "the hub can't be asked" in said[0]
