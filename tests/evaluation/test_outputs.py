"""What lies on disk afterwards: formats, honesty where nothing was labelled, equal bytes for equal results."""

import csv
import html
import json
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from small_settings import SHIPPED
from synthetic import assess_synthetic, contrast_scorer, synthetic_sample

from flawsmith.config import load_settings
from flawsmith.data.dataset import GOOD
from flawsmith.data.images import read_image, to_uint8
from flawsmith.data.tiling import Tiling
from flawsmith.evaluation.assess import LIMITING, assess
from flawsmith.evaluation.config import EvaluateSettings
from flawsmith.evaluation.gallery import HeatScale, failures_sheet, heat_panel, panels, sheet
from flawsmith.evaluation.intervals import share_interval
from flawsmith.evaluation.metrics import KEYS
from flawsmith.evaluation.outputs import metrics_content, write_data, write_parity_images
from flawsmith.evaluation.report import (
    ReportHeader,
    alarm_warning,
    compare_to_baseline,
    gallery_order,
    summary,
    write_html,
    write_report,
)
from flawsmith.evaluation.samples import EvaluationSet
from flawsmith.evaluation.threshold import conformal_threshold
from flawsmith.files import digest_path


@pytest.fixture(scope="module")
def result():
    return assess_synthetic(16, 48, bootstrap=40)


def judged(result, labelled=True):
    return EvaluationSet(result.samples, labelled)


def header(result, labelled=True, category="tiles"):
    return ReportHeader(category, load_settings(SHIPPED), judged(result, labelled))


@pytest.fixture(scope="module")
def folders(result, tmp_path_factory):
    made = {}
    for labelled in (True, False):
        folder = tmp_path_factory.mktemp("evaluate") / "out"
        write_data(folder, result, judged(result, labelled))
        write_parity_images(folder / "parity", result.samples, 6, Tiling((48, 48)))
        write_report(folder, result, header(result, labelled))
        made[labelled] = folder
    return made


def rows(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_metrics_json_keeps_its_contract(folders, result):
    content = json.loads((folders[True] / "metrics.json").read_text())
    for part in (content, content["baseline"]):
        for key in (*KEYS, "calibration_false_alarm_rate", "test_false_alarm_rate", "test_detection_rate"):
            low, high = part[f"{key}_ci"]
            assert 0 <= low <= part[key] <= high <= 1
    assert content["labelled"] is True
    assert (content["n_good"], content["n_defective"]) == (8, 8)
    assert content["threshold"] == result.detector.threshold.value
    assert content["false_alarm_rate"] == 0.05
    assert set(content["by_defect"]) == {"disc", "stroke"}
    assert {"image_auroc", "pixel_auroc", "aupro", "n"} <= set(content["by_defect"]["disc"])
    assert sum(part["n"] for part in content["by_defect"].values()) == 8


def test_every_output_says_when_nothing_was_labelled(folders, result):
    folder = folders[False]
    content = json.loads((folder / "metrics.json").read_text())
    assert content["labelled"] is False
    assert "synthetic" in content["scored_on"]
    assert "Not measured on real defects" in (folder / "report.html").read_text()
    assert "Not measured on real defects" not in (folders[True] / "report.html").read_text()
    assert "SYNTHETIC" in header(result, False).title
    for name in ("roc.csv", "pr.csv", "curves/pixel_roc.csv", "curves/pixel_pr.csv", "curves/pro.csv"):
        assert all("synthetic" in row["scored_on"] for row in rows(folder / name))
        assert not any("synthetic" in row["scored_on"] for row in rows(folders[True] / name))
    pictures = ("figures/scores.png", "figures/curves.png", "figures/pixel_curves.png")
    for name in (*pictures, "gallery/worst.png", "gallery/limiting.png"):
        assert (folder / name).read_bytes() != (folders[True] / name).read_bytes()  # the titles differ


def test_equal_results_give_equal_bytes(folders, result, tmp_path):
    write_data(tmp_path, result, judged(result))
    write_parity_images(tmp_path / "parity", result.samples, 6, Tiling((48, 48)))
    write_report(tmp_path, result, header(result))
    assert digest_path(tmp_path) == digest_path(folders[True])


def test_scores_bring_the_verdicts_back(folders, result):
    found = rows(folders[True] / "scores.csv")
    threshold = json.loads((folders[True] / "metrics.json").read_text())["threshold"]
    assert [row["file"] for row in found] == [sample.name for sample in result.samples]
    for row, score in zip(found, result.detector.scores.scores, strict=True):
        assert np.float32(row["score"]) == score
        assert row["verdict"] == ("defective" if np.float32(row["score"]) > threshold else "good")
    calibration = [np.float32(row["score"]) for row in rows(folders[True] / "calibration_scores.csv")]
    assert sum(score > threshold for score in calibration) == sum(
        score > result.detector.threshold.value for score in result.detector.calibration.scores
    )
    assert len(calibration) == 40


def test_failures_show_both_classes_even_where_one_is_smaller(folders, result):
    shown = read_image(folders[True] / "figures" / "failures.png")
    fewer = failures_sheet(replace(result, alarms=result.alarms[:2]), "tiles")
    assert fewer.shape == shown.transpose(1, 2, 0).shape  # the longer column sets the height
    assert (to_uint8(shown)[-100:, fewer.shape[1] // 2 + 20 :] != 255).any()
    assert (fewer[-100:, fewer.shape[1] // 2 + 20 :] == 255).all()
    assert failures_sheet(replace(result, misses=(), alarms=()), "tiles").shape[0] < 150


def test_draws_are_the_bootstrap_s_in_plain_arrays(folders, result):
    with np.load(folders[True] / "draws.npz", allow_pickle=False) as draws:
        assert set(draws) == set(KEYS)
        for key in KEYS:
            np.testing.assert_array_equal(draws[key], result.detector.draws[key])


def test_curves_rise_and_their_area_is_the_metric(folders, result):
    found = rows(folders[True] / "curves/pixel_roc.csv")
    x, y = ([float(row[key]) for row in found] for key in ("fpr", "tpr"))
    assert x[0] == 0
    assert x[-1] == y[-1] == 1
    assert y == sorted(y)
    assert np.trapezoid(y, x) == pytest.approx(result.detector.values["pixel_auroc"].value, abs=0.01)
    precision = [float(row["precision"]) for row in rows(folders[True] / "pr.csv")]
    assert np.mean(precision[1:]) == pytest.approx(result.detector.values["image_ap"].value, abs=0.01)


def test_report_is_one_file_without_outside_help(folders):
    text = (folders[True] / "report.html").read_text()
    assert not re.search(r"""(src|href|srcset)=["'](?!data:)""", text)
    assert "http" not in re.sub(r"data:image/[a-z]+;base64,[A-Za-z0-9+/=]+", "", text)
    # whole gallery, the typical image of each kind among it, and the normals that set the threshold
    assert text.count("<article") == 16 + LIMITING


def test_gallery_opens_with_what_is_typical_then_goes_from_worst_to_closest(result):
    shown = gallery_order(result)
    assert {example.name for example in shown} == {example.name for example in (*result.typical, *result.gallery)}
    assert len({example.name for example in shown}) == len(shown)
    typical, rest = shown[: len(result.typical)], shown[len(result.typical) :]
    assert {example.defect for example in typical} == {GOOD, "disc", "stroke"}
    assert typical[0].verdict == "found"
    assert [example.error for example in rest] == sorted((example.error for example in rest), reverse=True)


def test_slider_tells_what_each_setting_would_do(folders, result):
    page = html.unescape((folders[True] / "report.html").read_text())
    steps = json.loads(re.search(r'data-steps="(.*?\])"', page)[1])
    defective = np.asarray([sample.is_defective for sample in result.samples])
    for step in steps:
        threshold = conformal_threshold(result.detector.calibration.scores, float(step["rate"])).value
        assert step["value"] == threshold
        flagged = result.detector.scores.scores.astype(float) > threshold
        assert (step["missed"], step["alarms"]) == ((~flagged & defective).sum(), (flagged & ~defective).sum())
    chosen = steps[int(re.search(r'id="slider".*? value="(\d+)"', page)[1])]
    assert (chosen["value"], chosen["rate"]) == (result.detector.threshold.value, "0.05")
    assert [step["note"] != "" for step in steps].count(True) == 1


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="no chromium here: what the report's script does is NOT tested")
def test_report_slides_filters_and_enlarges_in_a_browser(folders, tmp_path):
    hands = """<script>
    slider.value = slider.max; slider.dispatchEvent(new Event("input"));
    document.querySelector("input[value=missed]").click();
    const missed = inGallery.filter(card => !card.hidden);
    missed[0].querySelector("button").click();
    viewer.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));
    document.title = JSON.stringify([missed.length, missed.every(card => card.matches(".missed.wrong")), viewer.open,
      viewer.querySelectorAll("img").length, missed.indexOf(enlarged),
      document.querySelector("[data-step=missed]").value]);
    </script>"""
    page = tmp_path / "page.html"
    page.write_text((folders[True] / "report.html").read_text().replace("</body>", f"{hands}</body>"))
    call = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
    dumped = subprocess.run([*call, page.as_uri()], capture_output=True, text=True, check=True, timeout=120).stdout
    count, wrong, is_open, panes, place, told = json.loads(html.unescape(re.search("<title>(.*?)</title>", dumped)[1]))
    assert count == int(told) > 1  # all images of this small set stand in the gallery
    assert (wrong, is_open, panes, place) == (True, True, 3, 1)


def test_report_escapes_what_a_folder_is_called(result, tmp_path):
    figures = dict.fromkeys(("scores", "curves", "pixel_curves"), ("data:,", "data:,"))
    write_html(tmp_path / "report.html", result, header(result, category="<script>x</script>"), figures)
    text = (tmp_path / "report.html").read_text()
    assert "<script>x" not in text
    assert "&lt;script&gt;x&lt;/script&gt;" in text


def test_parity_images_are_lossless_and_of_both_kinds(folders, result):
    paths = sorted((folders[True] / "parity").glob("*.png"))
    assert len(paths) == 6
    kinds = [path.stem.split("-")[1] for path in paths]
    assert kinds.count(GOOD) == 3
    assert {"disc", "stroke"} <= set(kinds)
    by_stem = {sample.name.split("/")[1].removesuffix(".png"): sample for sample in result.samples}
    for path in paths:
        image = by_stem[path.stem.split("-")[2]].load()[0]
        np.testing.assert_array_equal(to_uint8(read_image(path)), to_uint8(image))


def test_words_agree_with_the_counts(result):
    content = metrics_content(result, judged(result))
    found = round(content["test_detection_rate"] * 8)
    false = round(content["test_false_alarm_rate"] * 8)
    assert f"finds {found} of 8 defective images and flags {false} of 8 good ones" in summary(result, judged(result))
    assert "clearly better in" in compare_to_baseline(result)
    assert alarm_warning(result.detector) is None


def test_heat_colours_cross_the_middle_at_the_pixel_threshold(result):
    scale = HeatScale.of(result.detector)
    levels = np.asarray([[scale.floor - 1, scale.floor, scale.threshold, scale.ceiling, scale.ceiling + 1]], np.float32)
    np.testing.assert_allclose(scale(levels), [[0, 0, 0.5, 1, 1]], atol=1e-5)
    steady = np.linspace(scale.floor, scale.ceiling, 100, dtype=np.float32)[None]
    assert (np.diff(scale(steady)) >= 0).all()


def test_panels_show_the_truth_and_leave_a_good_image_alone(result):
    scale = HeatScale.of(result.detector)
    for example in result.gallery:
        plain, truth, heat = panels(example, scale)
        assert plain.shape == truth.shape == heat.shape == (48, 48, 3)
        np.testing.assert_array_equal(plain, to_uint8(example.image))
        assert (plain != truth).any() == example.mask.any()
        assert (example.verdict in ("missed", "false alarm")) == example.is_wrong


def test_flat_map_still_draws():
    flat = np.zeros((8, 8), np.float32)
    panel = heat_panel(np.full((3, 8, 8), 0.5, np.float32), flat, HeatScale(0, 0, 0), flagged=True)
    assert panel.shape == (8, 8, 3)


def test_too_eager_detector_is_warned_about(result):
    performance = replace(result.detector, test_false_alarms=share_interval(20, 40))
    assert "train/good" in str(alarm_warning(performance))


def test_nan_never_reaches_metrics_json(result, tmp_path):
    values = {**result.detector.values, "aupro": result.detector.values["aupro"]._replace(value=float("nan"))}
    with pytest.raises(ValueError):
        write_data(tmp_path, replace(result, detector=replace(result.detector, values=values)), judged(result))
    assert not (tmp_path / "metrics.json").exists()


def test_a_large_image_is_shrunk_before_it_is_drawn_and_loses_no_defect(result):
    """One hot and one marked pixel of a 2500 x 700 image: both are seen at a third of the size, and in a sheet."""
    image, mask = np.full((3, 2500, 700), 0.5, np.float32), np.zeros((2500, 700), np.bool_)
    mask[2000, 600] = True
    hot = np.where(mask, 1e3, -1e3).astype(np.float32)
    example = replace(result.gallery[0], image=image, mask=mask, anomaly_map=hot)
    scale = HeatScale.of(result.detector)
    plain, truth, heat = panels(example, scale)
    assert plain.shape == truth.shape == heat.shape == (834, 234, 3)
    assert (plain != truth).any()
    row, column = np.unravel_index(int(heat.astype(int).sum(axis=2).argmax()), heat.shape[:2])
    assert abs(row - 2000 // 3) <= 1
    assert abs(column - 600 // 3) <= 1
    page = sheet([example], scale, "title")
    grey = (page[60:220, :180] == 128).all(axis=2)
    assert np.ptp(np.flatnonzero(grey.any(axis=1))) > 120  # the long side fills its pane
    assert np.ptp(np.flatnonzero(grey.any(axis=0))) < 60  # and the short one is not stretched


def test_parity_images_of_a_tiled_model_are_tiles_that_show_the_defect(result, tmp_path):
    tiling = Tiling((32, 32), 1.0, 0)  # the items have 48 x 48 pixels
    write_parity_images(tmp_path, result.samples, 6, tiling)
    assert len(list(tmp_path.iterdir())) == 6
    for path in tmp_path.iterdir():
        sample = next(one for one in result.samples if path.stem.endswith(f"{one.defect}-{one.name[-9:-4]}"))
        tile, (image, mask) = read_image(path), sample.load()
        shares = {
            int(mask[top : top + 32, left : left + 32].sum()): image[:, top : top + 32, left : left + 32]
            for top, left in reversed(tiling.places(48, 48))  # of equal ones the first
        }
        assert tile.shape == (3, 32, 32)
        if sample.is_defective:
            np.testing.assert_allclose(tile, shares[max(shares)], atol=0.5 / 255)


def assessed(masks):
    """The toy evaluation where only the defects named have masks."""

    def sample(index):
        made = synthetic_sample(index, 48)
        if not made.is_defective or made.defect in masks:
            return made
        image, mask = made.load()
        return replace(made, load=lambda: (image, np.zeros_like(mask)), has_pixel_labels=False)

    return assess(
        contrast_scorer,
        lambda batch: contrast_scorer(batch, sigma=0.7),
        [sample(index) for index in range(16)],
        [synthetic_sample(4 * index, 48) for index in range(10_000, 10_040)],
        np.random.default_rng(0),
        EvaluateSettings(bootstrap=20, batch=8, gallery=16),
    )


def test_without_masks_images_are_measured_and_pixels_are_not_and_every_output_says_so(result, tmp_path):
    bare = assessed(())
    write_data(tmp_path, bare, judged(bare))
    write_report(tmp_path, bare, header(bare))
    content = json.loads((tmp_path / "metrics.json").read_text())
    for key in KEYS:
        assert (content[key] is None) == key.startswith(("pixel", "aupro")), key
        assert (content["by_defect"]["disc"].get(key) is None) == (key != "image_auroc"), key
    assert content["image_auroc"] == round(result.detector.values["image_auroc"].value, 6)
    assert (content["n_defective"], content["n_with_mask"]) == (8, 0)
    assert json.loads((tmp_path / "summary" / "detector.json").read_text())["aupro"] is None
    assert set(np.load(tmp_path / "draws.npz")) == {"image_auroc", "image_ap", "image_f1_max"}
    assert rows(tmp_path / "curves" / "pro.csv") == []
    assert "Pixels are not measured, since no defective image has a mask." in summary(bare, judged(bare))
    page = (tmp_path / "report.html").read_text()
    assert "Pixels are not measured" in page
    assert "nan" not in re.sub(r"data:image/[^\"]*", "", page).lower().replace("finance", "")
    assert not (tmp_path / "figures" / "pixel_curves.png").exists()


def test_where_some_have_masks_pixels_are_measured_on_those(result):
    half = assessed(("disc",))
    content = metrics_content(half, judged(half))
    whole = metrics_content(result, judged(result))
    assert content["by_defect"]["disc"]["pixel_auroc"] == pytest.approx(
        whole["by_defect"]["disc"]["pixel_auroc"], abs=1e-3
    )
    assert content["by_defect"]["stroke"]["aupro"] is None
    assert 0 < content["aupro"] < 1
    assert content["n_with_mask"] == 4
    assert "measured on the good images and the 4 of 8 defective ones that have a mask" in summary(half, judged(half))
