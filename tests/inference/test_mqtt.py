"""Results to a broker: none lost when it, or the watch, is killed; what a wrong login or certificate is told."""

import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from certificates import write_certificates
from line_samples import PATIENCE, json_lines, plate, start, wait_until
from mqtt_broker import Broker, broker_in, needs_broker, reading
from ports import free_port

import flawsmith.inference.mqtt as mqtt_module
from flawsmith.errors import UserError
from flawsmith.inference.journal import Journal
from flawsmith.inference.mqtt import SPOOL, make_message, open_mqtt, read_credentials
from flawsmith.inference.options import MqttOptions, PredictOptions
from flawsmith.inference.predictor import Predictor
from flawsmith.inference.spool import Spool
from flawsmith.inference.watch import watch_folder

Predict = Callable[..., "subprocess.CompletedProcess[str]"]
ROW = {"file": "a.png", "verdict": "unreadable", "error": "damaged", "sha256": "", "model": {"digest": "ab" * 32}}


@pytest.fixture
def line(tmp_path: Path) -> Path:
    folder = tmp_path / "line"
    folder.mkdir()
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def nowhere() -> str:
    return f"mqtt://127.0.0.1:{free_port()}"


@contextmanager
def watch_process(*arguments: object) -> Iterator["subprocess.Popen[str]"]:
    process = start(*arguments, "--no-overlays", "--poll", 0.05)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def spooled(out: Path) -> list[str]:
    spool = Spool(out / SPOOL / "mqtt.sqlite")
    found = [message for _, message in spool.first(1000)]
    spool.close()
    return found


@needs_broker
def test_a_watch_sends_its_results_once_each(model: Path, line: Path, out: Path, tmp_path: Path) -> None:
    with broker_in(tmp_path / "broker") as broker, reading(broker) as reader:
        plate(line / "a.png")
        (line / "b.png").write_text("no image")
        with watch_process(model, "--watch", line, "--out", out, "--mqtt", broker.url) as process:
            reader.wait_for(lambda: len(reader.messages) == 2, "what lay there")
            plate(line / "c.png", bright=True)
            reader.wait_for(lambda: len(reader.messages) == 3, "what came")
            process.send_signal(signal.SIGTERM)
            _, told = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert f"Results go to flawsmith/results on the MQTT broker at 127.0.0.1:{broker.port}." in told
    predictor = Predictor(model)
    for message, row in zip(reader.messages, json_lines(out / "results.jsonl"), strict=True):
        del row["stat"]
        row["regions"] = [{k: v for k, v in region.items() if k != "polygon"} for region in row.get("regions", [])]
        assert message.pop("model") == {
            "category": "plate", "version": "", "digest": predictor.digest, "provider": "cpu",
        }  # fmt: skip
        told_beside = {"schema", "id", "time"}
        assert {k: v for k, v in message.items() if k not in told_beside} == {
            k: v for k, v in row.items() if k != "regions" or row["verdict"] != "unreadable"
        }
    assert {message["verdict"] for message in reader.messages} == {"good", "unreadable", "defective"}
    assert len({message["id"] for message in reader.messages}) == 3
    assert spooled(out) == []


@needs_broker
def test_a_broker_that_is_killed_and_comes_back_gets_all(model: Path, line: Path, out: Path, tmp_path: Path) -> None:
    with broker_in(tmp_path / "broker") as broker, reading(broker) as reader:
        plate(line / "0.png")
        with watch_process(model, "--watch", line, "--out", out, "--mqtt", broker.url) as process:
            reader.wait_for(lambda: len(reader.messages) == 1, "the first")
            for time in (1, 2):
                broker.kill()
                for number in range(3):
                    plate(line / f"{time}-{number}.png", shade=40 + 10 * time + number)
                wait_until(lambda: len(json_lines(out / "results.jsonl")) == 1 + 3 * time, "the verdicts")  # noqa: B023
                broker.start()
                reader.wait_for(lambda: len(reader.files) == 1 + 3 * time, "what waited")  # noqa: B023
            process.send_signal(signal.SIGTERM)
            _, told = process.communicate(timeout=PATIENCE)
    assert reader.files == [row["file"] for row in json_lines(out / "results.jsonl")]
    by_file = {(message["file"], message["id"]) for message in reader.messages}
    assert len(by_file) == len(reader.files)  # what came twice has one id
    assert "cannot be reached" in told
    assert "Traceback" not in told


@needs_broker
def test_a_killed_watch_leaves_its_results_to_the_next(model: Path, line: Path, out: Path, tmp_path: Path) -> None:
    with broker_in(tmp_path / "broker") as broker, reading(broker) as reader:
        broker.kill()
        for number in range(5):
            plate(line / f"{number}.png", shade=40 + number)
        arguments = (model, "--watch", line, "--out", out, "--mqtt", broker.url)
        with watch_process(*arguments) as process:
            wait_until(lambda: len(json_lines(out / "results.jsonl")) == 5, "the verdicts")
            process.kill()
            process.wait()
        assert len(spooled(out)) == 5
        broker.start()
        with watch_process(*arguments):
            reader.wait_for(lambda: len(reader.files) == 5, "what the killed one has left")
    assert reader.files == [row["file"] for row in json_lines(out / "results.jsonl")]


def test_a_kill_between_spool_and_journal_sends_twice_with_one_id(
    model: Path, line: Path, out: Path, nowhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plate(line / "a.png")
    options = PredictOptions(poll=0.02, idle=0.2, mqtt=MqttOptions(nowhere))
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            watch_folder(Predictor(model), line, out, options)
    watch_folder(Predictor(model), line, out, options)
    one, other = spooled(out)
    assert identity(one) == identity(other)
    plate(line / "b.png")
    watch_folder(Predictor(model), line, out, options)
    assert identity(spooled(out)[-1]) != identity(one)


def _interrupted(_journal: Journal, _row: object) -> None:
    raise KeyboardInterrupt


def identity(message: str) -> str:
    return message.partition('"id": "')[2][:32]


def test_an_image_sent_over_http_has_an_id_of_its_own() -> None:
    assert identity(make_message(ROW)) != identity(make_message(ROW))
    watched = {**ROW, "stat": [1, 2, 3, 4]}
    assert identity(make_message(watched)) == identity(make_message(watched))
    assert identity(make_message(watched)) != identity(make_message({**watched, "stat": [1, 2, 3, 5]}))


def test_a_broker_that_is_not_there_does_not_stop_the_watch(
    model: Path, line: Path, out: Path, nowhere: str, predict: Predict
) -> None:
    plate(line / "a.png")
    done = predict(model, "--watch", line, "--out", out, "--watch-idle", 0.3, "--poll", 0.05, "--mqtt", nowhere)
    assert done.returncode == 0
    warning, waiting = (told for told in done.stderr.splitlines() if str(out / SPOOL) in told)
    assert warning.startswith(f"The MQTT broker at {nowhere[7:]} cannot be reached (Connection refused); results wait")
    assert waiting == f"Results that wait in {out / SPOOL / 'mqtt.sqlite'}: 1; the next start sends them."
    assert [row["verdict"] for row in json_lines(out / "results.jsonl")] == ["good"]
    assert len(spooled(out)) == 1


def test_a_full_spool_leaves_results_out_and_says_so(
    tmp_path: Path, nowhere: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spool = Spool(tmp_path / "mqtt.sqlite", limit=30_000)
    monkeypatch.setattr(mqtt_module, "Spool", lambda path: spool)
    with open_mqtt(MqttOptions(nowhere), tmp_path) as sink:
        for _ in range(200):
            sink.add(ROW)
        kept = len(spool)
        assert 20 < kept < 200
        spool.remove(spool.first(30)[-1][0])  # as if the broker had taken them: whole pages of the file
        sink.add(ROW)
        told = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
        assert told == [
            f"{spool.path} is full: results are not sent until the broker has taken some.",
            f"{spool.path} has place again; left out: {200 - kept} results.",
        ]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Broker, Path]]:
    """A broker with TLS that lets `line` in with the password `secret` and lets it write results alone; and its CA."""
    folder = tmp_path_factory.mktemp("guarded")
    write_certificates(folder)
    passwords, rights = folder / "passwords", folder / "rights"
    subprocess.run(["mosquitto_passwd", "-b", "-c", passwords, "line", "secret"], check=True)
    rights.write_text("user line\ntopic readwrite flawsmith/results\ntopic read flawsmith/#\n")
    with broker_in(
        folder / "broker", allow_anonymous="false", password_file=passwords, acl_file=rights,
        cafile=folder / "ca.pem", certfile=folder / "server.pem", keyfile=folder / "server.key",
    ) as broker:  # fmt: skip
        yield broker, folder / "ca.pem"


def written(folder: Path, *lines: str) -> Path:
    path = folder / "broker.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


@needs_broker
def test_login_and_certificates_come_from_a_file(
    guarded: tuple[Broker, Path], model: Path, line: Path, out: Path, tmp_path: Path, predict: Predict
) -> None:
    broker, ca = guarded
    plate(line / "a.png")
    asked = ("--watch", line, "--out", out, "--watch-idle", 0.3, "--poll", 0.05)
    told = ("--mqtt", f"mqtts://127.0.0.1:{broker.port}", "--mqtt-credentials", tmp_path / "broker.yaml")
    (tmp_path / "ca.pem").write_bytes(ca.read_bytes())
    with reading(broker, login=("line", "secret"), ca=ca) as reader:
        for lines, sentence in (
            (["username: line", "password: wr0ng", "ca: ca.pem"], "refuses us (Not authorized); correct `username`"),
            (["username: line", "password: secret"], "offers no TLS that is accepted here"),
            (["ca: broker.yaml"], "A certificate or key that"),
        ):
            written(tmp_path, *lines)
            refused = predict(model, *asked, *told)
            assert refused.returncode == 2
            (line_told,) = (text for text in refused.stderr.splitlines() if text.startswith("flawsmith: "))
            assert sentence in line_told
            assert not {"wr0ng", "secret", "Traceback"} & set(refused.stderr.replace(".", " ").split())
        assert json_lines(out / "results.jsonl") == []
        written(tmp_path, "username: line", "password: secret", "ca: ca.pem")
        assert predict(model, *asked, *told).returncode == 0
        reader.wait_for(lambda: reader.files == ["a.png"], "the result")


@needs_broker
def test_what_the_broker_refuses_stays_in_the_spool(
    guarded: tuple[Broker, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker, ca = guarded
    monkeypatch.setattr(mqtt_module, "DRAIN", 0.3)
    credentials = written(tmp_path, "username: line", "password: secret", f"ca: {ca}")
    options = MqttOptions(f"mqtts://127.0.0.1:{broker.port}", "somewhere/else", credentials)
    with open_mqtt(options, tmp_path / "spool") as sink:
        sink.add(ROW)
        wait_until(lambda: "takes no results on somewhere/else (Not authorized)" in caplog.text, "the refusal")
    assert len(Spool(tmp_path / "spool" / "mqtt.sqlite")) == 1


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (["pasword: hidden"], r"unknown key `pasword`; did you mean `password`\?"),
        (["password: 7777"], r"`password` must be text; put it in quotes\."),
        (["password: [7777"], r"holds no `key: value` lines; write for example"),
        (["hidden"], r"holds no `key: value` lines; write for example"),
    ],
)
def test_a_wrong_file_of_credentials_shows_no_value(tmp_path: Path, lines: list[str], sentence: str) -> None:
    path = written(tmp_path, *lines)
    with pytest.raises(UserError, match=sentence) as caught:
        read_credentials(path)
    assert str(path) in str(caught.value)
    assert not {"hidden", "7777"} & set(str(caught.value).replace("`", " ").split())


def test_certificates_want_tls(tmp_path: Path) -> None:
    options = MqttOptions("mqtt://127.0.0.1:1", credentials=written(tmp_path, "ca: ca.pem"))
    with (
        pytest.raises(UserError, match=r"names certificates, but --mqtt is no mqtts:// URL"),
        open_mqtt(options, tmp_path / "spool"),
    ):
        pass


@pytest.mark.parametrize(
    ("url", "broker"),
    [
        ("mqtt://line.local", ("line.local", 1883, False)),
        ("mqtts://10.0.0.7/", ("10.0.0.7", 8883, True)),
        ("mqtts://[::1]:99", ("::1", 99, True)),
    ],
)
def test_a_url_names_the_broker(url: str, broker: tuple[str, int, bool]) -> None:
    assert MqttOptions(url).broker == broker


@pytest.mark.parametrize("url", ["broker", "http://broker", "mqtt://", "mqtt://a:b", "mqtt://a/topic", "mqtt://a?b=c"])
def test_a_wrong_url_is_refused(url: str) -> None:
    with pytest.raises(UserError, match=r"is no URL of a broker; write mqtt://HOST:PORT"):
        MqttOptions(url)


def test_a_login_in_the_url_is_refused_and_not_shown(model: Path, line: Path, out: Path, predict: Predict) -> None:
    done = predict(model, "--watch", line, "--out", out, "--mqtt", "mqtt://me:hidden@broker")
    assert (done.returncode, "hidden" in done.stderr + done.stdout) == (2, False)
    assert "put it into the file of --mqtt-credentials" in done.stderr
    assert not out.exists()


def test_only_a_watch_sends(model: Path, line: Path, out: Path, predict: Predict) -> None:
    done = predict(model, line, "--out", out, "--mqtt", "mqtt://broker")
    assert done.returncode == 2
    assert "give one with --watch" in done.stderr


@pytest.mark.parametrize("topic", ["", "a/+/b", "a/#"])
def test_a_topic_without_wildcards(topic: str) -> None:
    with pytest.raises(UserError, match="is no topic of MQTT to publish on"):
        MqttOptions("mqtt://broker", topic)
