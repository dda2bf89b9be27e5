"""`serve --mqtt`: each verdict is in the spool before it is answered, and goes to the broker from there."""

import hashlib
from pathlib import Path

from mqtt_broker import broker_in, needs_broker, reading
from served import encoded, plate, serving
from toy_onnx import write_toy
from typer.testing import CliRunner

from flawsmith.cli import app


@needs_broker
def test_verdicts_are_answered_and_sent(tmp_path: Path) -> None:
    model = write_toy(tmp_path / "model.onnx")
    images = [encoded(plate(defect=False)), encoded(plate()), encoded(plate())]
    with broker_in(tmp_path / "broker") as broker, reading(broker) as reader:
        broker.kill()
        with serving(
            model, "--mqtt", broker.url, "--mqtt-spool", tmp_path / "spool", "--mqtt-topic", "flawsmith/1"
        ) as server:
            answers = [server.ask(path="/v1/predict?map=true", body=image).json for image in images]
            assert server.ask(body=b"no image").status == 422
            broker.start()
            reader.wait_for(lambda: len(reader.messages) >= 3, "the verdicts")
    messages = list({message["id"]: message for message in reader.messages}.values())
    assert [message["sha256"] for message in messages] == [hashlib.sha256(image).hexdigest() for image in images]
    for message, answer in zip(messages, answers, strict=True):
        assert (message["verdict"], message["score"], message["model"]) == (
            answer["verdict"], answer["score"], answer["model"],
        )  # fmt: skip


def test_a_place_for_the_spool_is_asked_for(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["serve", str(tmp_path / "model.onnx"), "--mqtt", "mqtt://broker"])
    assert "--mqtt-spool DIR" in str(done.exception)
