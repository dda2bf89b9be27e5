"""The registered model behind a real `mlflow models serve`, and inside this process."""

import base64
import io
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.tracking import MlflowClient
from numpy.typing import NDArray
from PIL import Image
from ports import free_port
from toy_onnx import SIZE, write_toy

from flawsmith.data.images import read_image
from flawsmith.errors import UserError
from flawsmith.inference.predictor import Predictor
from flawsmith.inference.serialise import describe, encode_map
from flawsmith.registry import serving
from flawsmith.registry.serving import REQUIREMENTS, fetch_artifact, log_serving_model, pip_requirements

NAME = "flawsmith-plate"
URI = f"models:/{NAME}@champion"
START_SECONDS = 120


def encoded(pixels: NDArray[np.generic], form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format=form)
    return stream.getvalue()


def plate(defect: bool = True) -> NDArray[np.uint8]:
    """48 x 64, dark, with a brighter field if `defect`."""
    pixels = np.random.default_rng(0).integers(20, 60, (48, 64, 3), np.uint8)
    if defect:
        pixels[10:20, 30:50] = 220
    return pixels


GOOD, DEFECTIVE = encoded(plate(defect=False)), encoded(plate())


@dataclass(frozen=True)
class Registered:
    """A store with one registered version, the champion."""

    folder: Path
    model_folder: Path  # of the version, in the artifact store
    onnx: Path

    def expected(self, content: bytes, folder: Path) -> dict[str, Any]:
        """What `flawsmith predict` says about the same file, and its map."""
        (folder / "expected").write_bytes(content)
        image = read_image(folder / "expected")
        predictor = Predictor(self.onnx)
        (prediction,) = predictor.predict([image])
        return {
            **describe(prediction, predictor, image.shape[1], image.shape[2]),
            "anomaly_map": prediction.anomaly_map.tolist(),
        }


def read_only_copy(package: Path, folder: Path) -> Path:
    copy = shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*copy.rglob("*"), copy]:
        path.chmod(path.stat().st_mode & ~0o222)
    return copy


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registered]:
    folder = tmp_path_factory.mktemp("registry")
    model = write_toy(folder / "model.onnx")
    for name in ("quality/docs/index.html", "other/docs/index.html", "report.html"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    try:
        experiment = mlflow.create_experiment("serving", artifact_location=(folder / "store").as_uri())
        with mlflow.start_run(experiment_id=experiment) as run, pytest.MonkeyPatch.context() as patch:
            patch.setattr(serving, "PACKAGE", read_only_copy(serving.PACKAGE, folder / "read-only"))
            info = log_serving_model(
                model,
                {
                    "docs": folder / "quality" / "docs",
                    "other": folder / "other" / "docs",
                    "report": folder / "report.html",
                },
                max_pixels=10_000,
            )
        client = MlflowClient()
        client.create_registered_model(NAME)
        made = client.create_model_version(NAME, info.model_uri, run_id=run.info.run_id, model_id=info.model_id)
        client.set_registered_model_alias(NAME, "champion", made.version)
        yield Registered(folder, next((folder / "store").rglob("MLmodel")).parent, model)
    finally:
        mlflow.set_tracking_uri(before)


@pytest.fixture(scope="module")
def loaded(registered: Registered) -> Any:
    return mlflow.pyfunc.load_model(URI)


@dataclass(frozen=True)
class Answer:
    status: int
    body: Any


@dataclass(frozen=True)
class Server:
    address: str
    process: int  # of the one that scores, not of the command that started it

    def post(self, content: Any) -> Answer:
        request = urllib.request.Request(  # noqa: S310
            f"{self.address}/invocations", json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:  # noqa: S310
                return Answer(reply.status, json.load(reply))
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, json.load(error))


@pytest.fixture(scope="module")
def server(registered: Registered) -> Iterator[Server]:
    """`mlflow models serve`, as the README has it, in a folder that is no checkout."""
    port = free_port()
    binaries = Path(sys.executable).parent
    log = registered.folder / "serve.log"
    with log.open("w") as stream:
        command = subprocess.Popen(
            [binaries / "mlflow", "models", "serve", "-m", URI, "--env-manager", "local", "--port", str(port)],
            cwd=registered.folder,
            env={
                **os.environ,
                "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
                "MLFLOW_TRACKING_URI": f"sqlite:///{registered.folder}/mlflow.db",
                "OMP_NUM_THREADS": "1",
            },
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(f"{address}/ping", command, log)
        children = Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text().split()
        yield Server(address, int(children[0]))
    finally:
        os.killpg(command.pid, signal.SIGTERM)
        command.wait(30)


def wait_for(address: str, command: "subprocess.Popen[bytes]", log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and command.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):  # noqa: S310
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"the model is not served:\n{log.read_text()}")


def base64_text(content: bytes) -> str:
    return base64.b64encode(content).decode()


@pytest.mark.slow
def test_mlflows_server_answers_as_predict_does(server: Server, registered: Registered, tmp_path: Path) -> None:
    """Beside `test_in_this_process`: over HTTP, in base64, by a process without torch."""
    answer = server.post({"dataframe_records": [{"image": base64_text(DEFECTIVE)}, {"image": base64_text(GOOD)}]})
    assert answer.status == 200
    expected = [registered.expected(content, tmp_path) for content in (DEFECTIVE, GOOD)]
    assert answer.body["predictions"] == expected  # the map too, to the last bit
    rows = {"columns": ["image"], "data": [[base64_text(DEFECTIVE)]]}
    del expected[0]["anomaly_map"]
    answer = server.post({"dataframe_split": rows, "params": {"map": "none"}})
    assert answer.body == {"predictions": expected[:1]}
    for body, said in (
        ({"dataframe_records": [{"image": base64_text(GOOD[:200])}]}, "The image of row 0 cannot be read as an image"),
        ({"dataframe_records": [{"picture": base64_text(GOOD)}]}, "image"),
        ({"dataframe_records": [{"image": 7}]}, "image"),
        ({"pictures": []}, "dataframe_records"),
    ):
        answer = server.post(body)
        assert answer.status == 400, answer
        assert said in answer.body["message"]
        assert "Traceback" not in json.dumps(answer.body)
    maps = Path(f"/proc/{server.process}/maps").read_text()
    assert "onnxruntime" in maps  # it is the process that scores
    assert "libtorch" not in maps


def test_a_fresh_process_runs_the_code_inside_the_version(registered: Registered, tmp_path: Path) -> None:
    """Where flawsmith is not installed, the version's own copy must do; so it must win where it is."""
    code = (
        "import sys, warnings, mlflow; warnings.simplefilter('ignore');"
        f"mlflow.pyfunc.load_model({str(registered.model_folder)!r});"
        "import flawsmith; print(flawsmith.__file__, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [str(registered.model_folder / "code" / "flawsmith" / "__init__.py"), "False"]


def test_in_this_process(loaded: Any, registered: Registered, tmp_path: Path) -> None:
    rows = pd.DataFrame({"image": [DEFECTIVE, encoded(plate(), "TIFF"), GOOD]})
    first, second, good = loaded.predict(rows)
    assert first == second == registered.expected(DEFECTIVE, tmp_path)
    assert (first["verdict"], good["verdict"], good["regions"]) == ("defective", "good", [])
    assert first["score"] > first["threshold"] == 0.5 > good["score"]
    (region,) = first["regions"]
    assert abs(region["x"] - 30) <= 2
    assert abs(region["y"] - 10) <= 2
    assert np.shape(first["anomaly_map"]) == (SIZE, SIZE)
    sixteen = encoded(np.full((8, 8), 40_000, np.uint16))
    (answer,) = loaded.predict(pd.DataFrame({"image": [sixteen]}), params={"map": "none"})
    assert answer["score"] == pytest.approx(round(40_000 / 257) / 255, rel=1e-6)  # on the levels of 8 bits


def test_the_map_as_a_picture(loaded: Any, registered: Registered, tmp_path: Path) -> None:
    expected = registered.expected(DEFECTIVE, tmp_path)
    (prediction,) = loaded.predict(pd.DataFrame({"image": [DEFECTIVE]}), params={"map": "png"})
    coded = prediction.pop("anomaly_map")
    with Image.open(io.BytesIO(base64.b64decode(coded["png"]))) as picture:
        levels = np.asarray(picture, np.float64)
    values = coded["low"] + levels / 65535 * (coded["high"] - coded["low"])
    assert np.abs(values - expected["anomaly_map"]).max() <= (coded["high"] - coded["low"]) / 65535
    assert prediction == {key: value for key, value in expected.items() if key != "anomaly_map"}


@pytest.mark.parametrize(
    ("images", "kind", "said"),
    [
        ([GOOD, GOOD[:200]], "none", "The image of row 1 cannot be read as an image"),
        ([b"no picture"], "none", "The image of row 0 cannot be read"),
        ([b""], "none", "The image of row 0 cannot be read"),
        ([None], "none", "The image of row 0 is NoneType, not the bytes of an image file"),
        (
            [encoded(np.zeros((101, 100), np.uint8))],
            "none",
            "The image of row 0 has 100 x 101 pixels, over the limit of 0.01 megapixels",
        ),
        ([GOOD], "tiff", "`map` is 'tiff'; it must be one of array, png, none."),
    ],
)
def test_what_cannot_be_scored_is_refused(loaded: Any, images: list[Any], kind: str, said: str) -> None:
    with pytest.raises(mlflow.MlflowException) as error:
        loaded.predict(pd.DataFrame({"image": images}), params={"map": kind})
    assert said in str(error.value)
    assert error.value.get_http_status_code() == 400


def test_a_model_that_answers_with_nan_is_not_the_clients_fault(
    tmp_path: Path, registered: Registered, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Predictor(write_toy(tmp_path / "model.onnx", gain=float("nan")))
    monkeypatch.setattr(loaded.unwrap_python_model(), "_predictor", broken)
    with pytest.raises(mlflow.MlflowException, match="NaN") as error:
        loaded.predict(pd.DataFrame({"image": [GOOD]}))
    assert error.value.get_http_status_code() == 500


def test_code_of_a_read_only_tree_is_stored_without_its_rights(registered: Registered) -> None:
    """As root nothing fails; anybody else's MLflow could not write into, or remove, its own copies."""
    code = registered.model_folder / "code" / "flawsmith"
    stored = [code, *code.rglob("*")]
    assert code / "inference" / "network.py" in stored
    assert all(path.stat().st_mode & stat.S_IWUSR for path in stored)


def test_no_pickle_inside_the_version(registered: Registered) -> None:
    files = [path for path in registered.model_folder.rglob("*") if path.is_file()]
    assert {"MLmodel", "served.py", "model.onnx", "serving.py"} <= {path.name for path in files}
    assert not [path for path in files if path.suffix in (".pkl", ".pickle", ".joblib", ".pt", ".pth", ".pyc")]
    assert not [path for path in files if path.read_bytes()[:2] in (b"\x80\x03", b"\x80\x04", b"\x80\x05")]


@pytest.mark.parametrize(
    ("name", "file", "content"),
    [
        ("docs", "index.html", "quality/docs/index.html"),
        ("other", "index.html", "other/docs/index.html"),
        ("report", "", "report.html"),
        ("model", "", "model.onnx"),
    ],
)
def test_one_artifact_is_fetched_alone(
    registered: Registered, tmp_path: Path, name: str, file: str, content: str
) -> None:
    fetched = fetch_artifact(URI, name, tmp_path)
    assert (fetched / file).read_bytes() == (registered.folder / content).read_bytes()
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == 1
    with pytest.raises(UserError, match=r"holds no artifact `parity` \(it holds docs, model, other, report\)"):
        fetch_artifact(URI, "parity", tmp_path)


def test_what_could_not_be_served_is_not_logged(tmp_path: Path) -> None:
    broken = tmp_path / "model.onnx"
    broken.write_bytes(b"no model")
    with pytest.raises(UserError, match="cannot be loaded as an ONNX model"):
        log_serving_model(broken)
    with pytest.raises(UserError, match=r"report\.html does not exist"):
        log_serving_model(broken, {"report": tmp_path / "report.html"})


def test_requirements_are_the_versions_installed_here(registered: Registered) -> None:
    assert pip_requirements() == [f"{name}=={version(name)}" for name in REQUIREMENTS]
    assert (registered.model_folder / "requirements.txt").read_text().splitlines() == pip_requirements()


def test_requirements_name_all_that_serving_imports() -> None:
    """Of a fresh process, without what MLflow brings for itself."""
    code = (
        "import sys; before = set(sys.modules); import flawsmith.inference.folder;"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    from importlib.metadata import packages_distributions

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    owners = packages_distributions()
    needed = {owners[name][0] for name in result.stdout.split() if name in owners} - {"flawsmith"}
    assert {"numpy", "onnxruntime", "pillow", "scipy"} <= needed
    assert needed - {"charset-normalizer"} <= set(REQUIREMENTS)  # that one is of requests, which MLflow needs


@pytest.mark.parametrize("make", [np.zeros, np.ones])
def test_a_flat_map_can_be_drawn(make: Callable[..., NDArray[np.float32]]) -> None:
    coded = encode_map(make((4, 4), np.float32))
    with Image.open(io.BytesIO(base64.b64decode(coded["png"]))) as picture:
        assert np.asarray(picture).dtype == np.uint16
        assert not np.asarray(picture).any()
    assert coded["low"] == coded["high"] == make(1)[0]
