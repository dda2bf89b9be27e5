"""Two exported models on the same images: what their difference may and may not say."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_onnx import write_toy

from flawsmith.data.dataset import GOOD
from flawsmith.data.tiling import Tiling
from flawsmith.errors import UserError
from flawsmith.evaluation.compare import COMPARED, RARE, ComparedImages, compare_models, pool_rare, predictor_scorer
from flawsmith.evaluation.config import EvaluateSettings
from flawsmith.evaluation.intervals import percentile_interval
from flawsmith.evaluation.measure import measure, paired_difference
from flawsmith.evaluation.metrics import HEADLINE
from flawsmith.evaluation.samples import Sample
from flawsmith.inference.predictor import Predictor
from flawsmith.randomness import numpy_generator
from flawsmith.stages.promote import _demand_scale

SIZE = 24
OPTIONS = EvaluateSettings(false_alarm_rate=0.05, bootstrap=100, aupro_limit=0.3, batch=8)
DRAWN = {GOOD: 20, "dent": 12, "scratch": 8, "stain": 3, "chip": 2}


def noisy_sample(index: int, defect: str) -> Sample:
    """A part of uneven brightness with noise of its own in each channel; a defect brightens a square in all three."""

    def load():
        generator = numpy_generator(0, "paired", index)
        image = 0.3 + 0.05 * generator.standard_normal() + 0.05 * generator.standard_normal((3, SIZE, SIZE), np.float32)
        mask = np.zeros((SIZE, SIZE), np.bool_)
        if defect != GOOD:
            row, column = generator.integers(0, SIZE - 6, 2)
            mask[row : row + 6, column : column + 6] = True
            image[:, mask] += generator.uniform(0.0, 0.15)
        return np.clip(image, 0, 1).astype(np.float32), mask

    return Sample(f"{defect}/{index:03d}.png", defect, load)


@pytest.fixture(scope="module")
def samples():
    kinds = [kind for kind, count in DRAWN.items() for _ in range(count)]
    return [noisy_sample(index, kind) for index, kind in enumerate(kinds)]


@pytest.fixture(scope="module")
def calibration():
    return [noisy_sample(index, GOOD) for index in range(500, 520)]


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """Models by name; `twin` sees almost what `model` sees, `inverted` says the opposite."""
    folder = tmp_path_factory.mktemp("toys")
    made = {
        "model": write_toy(folder / "model.onnx", weights=(0.5, 0.5, 0.0), shape=(SIZE, SIZE)),
        "copy": write_toy(folder / "copy.onnx", weights=(0.5, 0.5, 0.0), shape=(SIZE, SIZE)),
        "twin": write_toy(folder / "twin.onnx", weights=(0.5, 0.4, 0.1), shape=(SIZE, SIZE)),
        "inverted": write_toy(folder / "inverted.onnx", gain=-1.0, weights=(0.5, 0.5, 0.0), shape=(SIZE, SIZE)),
        "small": write_toy(folder / "small.onnx", weights=(0.5, 0.5, 0.0), shape=(SIZE // 2, SIZE // 2)),
    }
    return {name: Predictor(path, threads=1) for name, path in made.items()}


def compared(challenger, champion, samples, calibration, seed=0, min_defect_images=5, tiling=None):
    images, generator = ComparedImages(samples, calibration, tiling=tiling), numpy_generator(seed, "test")
    return compare_models(challenger, champion, images, generator, OPTIONS, min_defect_images)


@pytest.fixture(scope="module")
def twin_beside_model(toys, samples, calibration):
    return compared(toys["twin"], toys["model"], samples, calibration)


@pytest.fixture(scope="module")
def model_alone(toys, samples, calibration):
    return compared(toys["model"], None, samples, calibration)


def test_identical_models_differ_by_exactly_nothing(toys, samples, calibration):
    found = compared(toys["copy"], toys["model"], samples, calibration)
    assert set(found.differences) == set(COMPARED)
    assert set(found.defect_differences) == {"dent", "scratch", RARE}
    for estimate in (*found.differences.values(), *found.defect_differences.values()):
        assert estimate == (0, 0, 0)
    assert found.challenger == found.champion
    assert 0.6 < found.challenger.values["image_auroc"].value < 0.99, "the images must leave room for both answers"


def test_a_model_that_says_the_opposite_is_worse_beyond_doubt(toys, samples, calibration):
    found = compared(toys["inverted"], toys["model"], samples, calibration)
    for key in COMPARED:
        assert found.differences[key].value < 0
        assert found.differences[key].high < 0
    auroc = found.champion.values["image_auroc"].value
    assert found.challenger.values["image_auroc"].value == pytest.approx(1 - auroc)
    assert found.differences["image_auroc"].value == pytest.approx(1 - 2 * auroc)


def test_exchanging_the_models_turns_every_difference_round(twin_beside_model, toys, samples, calibration):
    forth = twin_beside_model
    back = compared(toys["model"], toys["twin"], samples, calibration)
    assert (forth.challenger, forth.champion) == (back.champion, back.challenger)
    for one, other in ((forth.differences, back.differences), (forth.defect_differences, back.defect_differences)):
        assert set(one) == set(other)
        for key, estimate in one.items():
            assert estimate == pytest.approx((-other[key].value, -other[key].high, -other[key].low))


def test_a_difference_is_that_of_the_values(twin_beside_model):
    found = twin_beside_model
    for key, estimate in found.differences.items():
        gap = found.challenger.values[key].value - found.champion.values[key].value
        assert estimate.value == pytest.approx(gap)
        assert estimate.low <= estimate.high
    for name, estimate in found.defect_differences.items():
        gap = found.challenger.by_defect[name].value - found.champion.by_defect[name].value
        assert estimate.value == pytest.approx(gap)


def test_a_first_model_stands_alone_with_the_figures_it_has_beside_another(model_alone, twin_beside_model):
    assert model_alone.champion is None
    assert model_alone.differences == {}
    assert model_alone.defect_differences == {}
    assert model_alone.challenger == twin_beside_model.champion
    assert model_alone.counts == twin_beside_model.counts
    assert model_alone.calibration_images == twin_beside_model.calibration_images


def test_same_seed_same_comparison_and_another_seed_other_intervals(model_alone, toys, samples, calibration):
    assert compared(toys["model"], None, samples, calibration) == model_alone
    other = compared(toys["model"], None, samples, calibration, seed=1).challenger.values
    for key, estimate in model_alone.challenger.values.items():
        assert other[key].value == estimate.value
        assert other[key] != estimate


def test_images_are_counted_with_rare_types_pooled(model_alone):
    found = model_alone
    assert found.counts == {"dent": 12, GOOD: 20, RARE: 5, "scratch": 8}
    assert found.calibration_images == 20
    assert set(found.challenger.by_defect) == {"dent", RARE, "scratch"}


def test_pooling_leaves_the_figures_over_all_images_as_they_are(toys, samples, calibration):
    pooled = compared(toys["model"], None, samples, calibration, min_defect_images=1000)
    apart = compared(toys["model"], None, samples, calibration, min_defect_images=1)
    assert set(pooled.challenger.by_defect) == {RARE}
    assert set(apart.challenger.by_defect) == set(DRAWN) - {GOOD}
    for key in COMPARED:
        assert pooled.challenger.values[key].value == apart.challenger.values[key].value
    assert pooled.challenger.by_defect[RARE].value == pooled.challenger.values["image_auroc"].value


names = st.sampled_from([GOOD, "dent", "scratch", "stain"])


@given(st.lists(names, max_size=30), st.integers(1, 12))
def test_pooling_renames_exactly_the_defects_of_rare_types(kinds, minimum):
    before = tuple(Sample(f"{index}.png", kind, lambda: None) for index, kind in enumerate(kinds))
    after = pool_rare(before, minimum)
    counts = Counter(kinds)
    assert [sample.name for sample in after] == [sample.name for sample in before]
    for old, new in zip(before, after, strict=True):
        rare = old.defect != GOOD and counts[old.defect] < minimum
        assert new == (replace(old, defect=RARE) if rare else old)
        assert new.is_defective == old.is_defective
    left = Counter(sample.defect for sample in after if sample.defect not in (GOOD, RARE))
    assert all(count >= minimum for count in left.values())


def test_a_model_of_another_input_size_is_compared_at_the_size_of_the_images(toys, samples, calibration, model_alone):
    image = samples[0].load()[0]
    maps, scores = predictor_scorer(toys["small"])(np.stack([image, image]))
    assert maps.shape == (2, SIZE, SIZE)
    assert (maps.dtype, scores.shape) == (np.float32, (2,))
    found = compared(toys["small"], toys["model"], samples, calibration)
    assert found.champion == model_alone.challenger
    assert found.differences["image_auroc"].value > 0, "averaging over noise must help this toy"
    for estimate in found.differences.values():
        assert np.isfinite(estimate).all()


def test_scores_and_maps_are_the_predictors_own(toys, samples):
    images = np.stack([sample.load()[0] for sample in samples[:3]])
    maps, scores = predictor_scorer(toys["model"])(images)
    for image, anomaly_map, score in zip(images, maps, scores, strict=True):
        (answer,) = toys["model"].predict([image])
        np.testing.assert_array_equal(anomaly_map, answer.anomaly_map)
        assert score == answer.score


def test_false_alarms_are_counted_at_the_threshold_in_each_models_own_file(tmp_path, toys, samples, calibration):
    answers = toys["model"].predict([sample.load()[0] for sample in calibration])
    scores = sorted(answer.score for answer in answers)

    def judging_at(threshold):
        path = write_toy(tmp_path / "model.onnx", weights=(0.5, 0.5, 0.0), shape=(SIZE, SIZE), threshold=threshold)
        return Predictor(path, threads=1)

    loose, tight = (judging_at((scores[rank - 1] + scores[rank]) / 2) for rank in (19, 15))
    found = compared(loose, tight, samples, calibration)
    assert found.challenger.false_alarms.value == 1 / 20
    assert found.champion.false_alarms.value == 5 / 20
    for standing in (found.challenger, found.champion):
        assert standing.false_alarms.low < standing.false_alarms.value < standing.false_alarms.high
    assert found.differences["image_auroc"] == (0, 0, 0), "thresholds do not enter the ranking"


def test_false_alarms_are_the_verdicts_that_the_predictor_gives(tmp_path, samples):
    """A score that float32 rounds up from the threshold lies above it for the predictor."""
    image, mask = np.ones((3, SIZE, SIZE), np.float32), np.zeros((SIZE, SIZE), np.bool_)
    weights = (1.0, 0.0, 0.0)
    path = write_toy(tmp_path / "model.onnx", gain=0.1, weights=weights, shape=(SIZE, SIZE), threshold=0.1)
    model = Predictor(path, threads=1)
    (verdict,) = model.predict([image])
    assert verdict.is_defective
    found = compared(model, None, samples[15:25], [Sample("white.png", GOOD, lambda: (image, mask))])
    assert found.challenger.false_alarms.value == 1


@pytest.mark.parametrize("only", [GOOD, "dent"])
def test_images_of_one_class_alone_are_refused(toys, samples, calibration, only):
    with pytest.raises(UserError, match="needs good and defective images"):
        compared(toys["model"], toys["copy"], [sample for sample in samples if sample.defect == only], calibration)


def test_without_calibration_normals_there_is_nothing_to_compare(toys, samples):
    with pytest.raises(UserError, match="no calibration image"):
        compared(toys["model"], None, samples, [])


def measured(toys, names, samples, calibration, **changes):
    scorers = [predictor_scorer(toys[name]) for name in names]
    options = replace(OPTIONS, bootstrap=150, **changes)
    return measure(scorers, samples, calibration, numpy_generator(0, "test"), options)


@pytest.fixture(scope="module")
def performances(toys, samples, calibration):
    return measured(toys, ("model", "twin"), samples, calibration)


@pytest.mark.parametrize("key", COMPARED)
def test_pairing_makes_the_difference_of_like_models_surer(performances, key):
    one, other = performances
    paired = paired_difference(one, other, key)
    apart = one.draws[key] - np.random.default_rng(0).permutation(other.draws[key])
    unpaired = percentile_interval(paired.value, apart)
    assert paired.high - paired.low < 0.8 * (unpaired.high - unpaired.low)


def test_paired_differences_of_one_type_use_that_types_images(performances):
    one, other = performances
    for name in one.by_defect:
        for key in HEADLINE:
            found = paired_difference(one, other, key, name)
            assert found.value == one.by_defect[name][key].value - other.by_defect[name][key].value
            draws = one.defect_draws[name][key] - other.defect_draws[name][key]
            assert found[1:] == pytest.approx(np.quantile(draws, [0.025, 0.975]))
    assert paired_difference(one, other, "image_auroc", "dent") != paired_difference(one, other, "image_auroc")


def test_measuring_beside_another_model_changes_nothing(performances, toys, samples, calibration):
    (alone,) = measured(toys, ("twin",), samples, calibration, batch=3)
    assert alone.values == performances[1].values
    assert alone.by_defect == performances[1].by_defect
    assert alone.threshold == performances[1].threshold


def test_images_as_they_are_are_judged_as_at_the_working_resolution(toys, samples, calibration, model_alone):
    """Without tiles a model stretches an image of any size; here it has its size already."""
    found = compared(toys["model"], None, samples, calibration, tiling=Tiling((SIZE, SIZE)))
    assert found == model_alone


def test_a_tiled_model_beside_a_whole_one_sees_the_same_images(tmp_path, toys, samples, calibration, model_alone):
    """Both at full resolution: a pointwise model answers the same in tiles of half the side as on the whole."""
    tiled = Predictor(
        write_toy(
            tmp_path / "tiled.onnx",
            weights=(0.5, 0.5, 0.0),
            shape=(SIZE // 2, SIZE // 2),
            scale=1.0,
            tile_overlap=SIZE // 8,
        )
    )
    maps, scores = predictor_scorer(tiled, Tiling((SIZE // 2, SIZE // 2), 1.0, SIZE // 8))(samples[0].load()[0][None])
    assert maps.shape == (1, SIZE, SIZE)
    (whole,) = toys["model"].predict([samples[0].load()[0]])
    np.testing.assert_allclose(maps[0], whole.anomaly_map, atol=1e-6)
    assert scores[0] == pytest.approx(whole.score, abs=1e-6)
    found = compared(tiled, toys["model"], samples, calibration, tiling=Tiling((SIZE, SIZE)))
    assert found.champion == model_alone.challenger
    for estimate in found.differences.values():
        assert estimate == pytest.approx((0, 0, 0), abs=1e-3)


def test_held_out_triplets_are_no_ground_to_compare_scales_on(toys):
    _demand_scale(None, 0.5)
    _demand_scale(toys["model"], 0.0)
    with pytest.raises(UserError, match=r"at scale 0, .* at data\.scale 0\.5 .*labelled test set"):
        _demand_scale(toys["model"], 0.5)
