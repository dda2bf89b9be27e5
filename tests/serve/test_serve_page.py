"""The page as a person meets it, in a headless Chromium driven by its own protocol."""

import base64
import itertools
import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import Server, encoded, plate, serving
from toy_onnx import write_toy
from websockets.sync.client import ClientConnection, connect

CHROMIUM = next(
    (found for name in ("chromium", "google-chrome", "chromium-browser") if (found := shutil.which(name))), ""
)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")]


class Tab:
    """One page of a browser."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._numbers, self._session = socket, itertools.count(1), ""
        self.problems: list[str] = []  # whatever the page's console complains of
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "DOM", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        self._socket.send(json.dumps(message | ({"sessionId": self._session} if self._session else {})))
        while True:
            answer = json.loads(self._socket.recv(timeout=30))
            if answer.get("method") == "Log.entryAdded" and answer["params"]["entry"]["level"] == "error":
                self.problems.append(answer["params"]["entry"]["text"])
            if answer.get("method") == "Runtime.exceptionThrown":
                self.problems.append(str(answer["params"]))
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def run(self, script: str) -> Any:
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def text(self, name: str) -> str:
        return str(self.run(f"document.getElementById('{name}').innerText"))

    def choose(self, file: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    def wait(self, script: str, seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, f"{script}: {self.run('document.body.innerText')}"
            time.sleep(0.05)

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    profile = tmp_path_factory.mktemp("profile")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--window-size=1100,800",
               "--remote-debugging-port=0", f"--user-data-dir={profile}"]  # fmt: skip
    process = subprocess.Popen([CHROMIUM, *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"ws://\S+", line):
                break
        else:
            pytest.fail("Chromium did not start")
        with connect(found.group(), max_size=None, proxy=None) as socket:
            yield Tab(socket)
    finally:
        process.kill()
        process.communicate(timeout=30)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(write_toy(tmp_path_factory.mktemp("model") / "model.onnx")) as running:
        yield running


def test_a_person_drops_images_and_sees_verdicts(server: Server, tab: Tab, tmp_path: Path) -> None:
    for name, content in (
        ("bad.png", encoded(plate())),
        ("fine.png", encoded(plate(defect=False))),
        ("torn.png", b"no"),
    ):
        (tmp_path / name).write_bytes(content)
    expected = server.ask(body=encoded(plate())).json
    tab.call("Page.navigate", url=server.url)
    tab.wait("document.readyState === 'complete' && document.getElementById('file') !== null")

    tab.choose(tmp_path / "bad.png")
    tab.wait("document.getElementById('verdict').innerText === 'Defective'")
    assert tab.text("status") == "bad.png"
    assert tab.text("model").startswith("plate, model ")
    assert tab.text("size") == "64 \N{MULTIPLICATION SIGN} 48"
    assert float(tab.text("score")) == pytest.approx(expected["score"], rel=1e-3)
    (region,) = expected["regions"]
    box = tab.run(
        "(r => [r.x, r.y, r.width, r.height].map(v => v.baseVal.value))(document.querySelector('#boxes rect'))"
    )
    assert box == [region["x"], region["y"], region["width"], region["height"]]
    tab.wait("document.getElementById('picture').complete && document.getElementById('picture').naturalWidth === 64")
    heat = tab.run("document.getElementById('picture').src")
    assert heat.startswith("data:image/png")
    tab.run("document.getElementById('heat').click()")
    assert tab.run("document.getElementById('picture').src").startswith("blob:")

    tab.choose(tmp_path / "fine.png")
    tab.wait("document.getElementById('verdict').innerText === 'Good'")
    assert tab.run("document.querySelectorAll('#boxes rect').length") == 0

    tab.choose(tmp_path / "torn.png")
    tab.wait("document.getElementById('status').className === 'problem'")
    assert "cannot be read as an image" in tab.text("status")
    assert tab.run("document.getElementById('result').hidden")
    # the browser itself notes the 422; nothing else may be wrong, a broken policy least of all
    assert [problem for problem in tab.problems if "422" not in problem] == []


def test_the_api_page_draws_itself_without_a_network(server: Server, tab: Tab) -> None:
    tab.problems.clear()
    tab.call("Page.navigate", url=f"{server.url}/docs")
    tab.wait("document.body.innerText.includes('/v1/predict')")
    assert tab.problems == []
