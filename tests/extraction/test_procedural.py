import pytest
import torch

from kegfast.extraction import procedural
from kegfast.extraction.familiar import Familiar
from kegfast.extraction.procedural import MOST, Blobs, DeadLeaves, bent


def draw(n, *args, seed=0, **options):
    torch.manual_seed(seed)
    return DeadLeaves(*args, **options).sample(n)[0]


@pytest.mark.parametrize("mean", [(0.1307,), (0.2856,), (0.4378, 0.4439, 0.4729)])
def test_pixels_have_the_moments_that_the_normalization_tells(mean):
    std = {0.1307: (0.3081,), 0.2856: (0.3385,)}.get(mean[0], (0.1980, 0.2011, 0.1971))
    images = draw(1500, (len(mean), 32, 32), mean, std)
    assert images.shape == (1500, len(mean), 32, 32)
    assert images.dtype == torch.float32
    assert images.isfinite().all()
    # Flat images, dark ones mostly, are drawn anew; blurring takes a little of the variance away.
    assert -0.04 < images.mean() < 0.35
    assert 0.9 < images.std() < 1.25
    assert images.flatten(1).std(1).min() > procedural.FLAT


def test_grays_follow_the_normalization_exactly():
    torch.manual_seed(0)
    grays = DeadLeaves((1, 4, 4), 0.1307, 0.3081).levels.sample((200_000,))
    assert grays.mean() == pytest.approx(0.1307, abs=0.003)
    assert grays.std() == pytest.approx(0.3081, abs=0.003)


def test_flat_images_stay_where_there_are_no_others():
    images = draw(50, (1, 8, 8), 1e-4, 0.0099)
    assert images.shape == (50, 1, 8, 8)


def test_pixels_stay_in_the_range_of_images():
    images = draw(300, (1, 32, 32), 0.1307, 0.3081) * 0.3081 + 0.1307
    assert images.min() > -1e-5
    assert images.max() < 1 + 1e-5


def test_uniform_greys_are_uniform():
    torch.manual_seed(0)
    grays = DeadLeaves((1, 4, 4), 0.1307, 0.3081, levels="uniform").levels.sample((50_000,))
    assert grays.mean() == pytest.approx(0.5, abs=0.005)
    assert grays.var() == pytest.approx(1 / 12, rel=0.02)


def test_half_of_the_images_are_sharp_and_none_has_more_than_eight_leaves(monkeypatch):
    blurred = []
    monkeypatch.setattr(procedural, "_blur", lambda images: blurred.append(images) or images + 5)
    images = draw(400, (1, 24, 24), 0.5, 0.25)
    soft = images.flatten(1).amin(1) > 10
    assert 150 < soft.sum() < 250
    grays = [len(image.unique()) for image in images]
    assert max(grays) <= MOST + 1
    assert min(grays) == 2
    assert len(set(grays)) >= MOST - 1


def test_leaves_are_rectangles_and_ellipses_at_any_angle():
    torch.manual_seed(0)
    covered = procedural._leaves(200, 32, 32, torch.device("cpu"))
    assert covered.shape == (200, MOST, 1, 32, 32)
    share = covered.float().mean((2, 3, 4)).flatten()
    assert share.max() < 1
    # Shares follow from log-uniform half sides: a median near 4 * 0.12^2, minus what the border cuts off.
    assert 0.01 < share.median() < 0.06


def test_blur_keeps_flat_regions_and_borders():
    image = torch.zeros(1, 1, 6, 6)
    image[..., 3:] = 1
    blurred = procedural._blur(image)
    assert torch.equal(blurred[0, 0, 0], torch.tensor([0, 0, 0.25, 0.75, 1, 1]))
    flat = torch.full((2, 3, 5, 7), 0.3)
    torch.testing.assert_close(procedural._blur(flat), flat)


def test_colors_differ_between_channels():
    images = draw(50, (3, 16, 16), 0.5, 0.25)
    assert not torch.allclose(images[:, 0], images[:, 1])


def test_draws_depend_on_the_seed_alone():
    assert torch.equal(draw(100, (1, 9, 13)), draw(100, (1, 9, 13)))
    assert not torch.equal(draw(100, (1, 9, 13)), draw(100, (1, 9, 13), seed=1))


def test_chunks_give_as_many_images_as_asked_for():
    assert len(draw(procedural.CHUNK + 1, (1, 4, 4))) == procedural.CHUNK + 1


def test_is_a_source_without_labels():
    assert DeadLeaves((1, 8, 8)).sample(2)[1] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sample_shape": (32, 32)}, "sample_shape"),
        ({"mean": 1.5}, "mean"),
        ({"mean": (0.5, 0.5)}, "mean"),
        ({"std": 0.0}, "std"),
        ({"std": float("nan")}, "std"),
        ({"mean": 0.5, "std": 0.6}, "std must be below"),
        ({"levels": "dark"}, "levels"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        DeadLeaves(**{"sample_shape": (1, 8, 8), **arguments})


@pytest.mark.parametrize("n", [0, -1, 2.0])
def test_a_bad_count_is_named(n):
    with pytest.raises((ValueError, TypeError), match="n must be"):
        DeadLeaves((1, 8, 8)).sample(n)


def test_more_leaves_where_they_are_asked_for():
    images = draw(64, (1, 48, 48), 0.5, 0.25, levels="uniform", most=30)
    assert max(len(image.unique()) for image in images) > MOST + 8
    with pytest.raises(ValueError, match="most"):
        DeadLeaves((1, 8, 8), most=0)


def test_blobs_are_of_two_greys_and_the_ground_has_the_more_usual_one(monkeypatch):
    monkeypatch.setattr(procedural, "_blur", lambda images: images)
    torch.manual_seed(0)
    images = Blobs((1, 32, 32), 0.1307, 0.3081).sample(320)[0] * 0.3081 + 0.1307
    assert images.shape == (320, 1, 32, 32)
    assert all(len(image.unique()) == 2 for image in images)
    dark = (images < 0.5).float().mean((1, 2, 3))
    assert (dark > 0.5).float().mean() > 0.85
    torch.manual_seed(0)
    assert Blobs((3, 20, 12), (0.4, 0.5, 0.6), (0.2, 0.2, 0.2)).sample(7)[0].shape == (7, 3, 20, 12)


def test_bent_images_stay_what_they_are_up_to_smooth_offsets():
    torch.manual_seed(0)
    flat = torch.full((4, 3, 16, 24), 0.7)
    torch.testing.assert_close(bent(flat), flat)
    ramp = torch.linspace(0, 1, 32).expand(64, 1, 32, 32)
    moved = bent(ramp)
    assert moved.amin() >= 0
    assert moved.amax() <= 1
    change = (moved - ramp).square().mean((1, 2, 3)).sqrt()
    assert change.min() < 0.05
    assert 0.05 < change.mean() < 0.3
    steps = (moved[..., 1:] - moved[..., :-1]).abs()
    assert steps.mean() < 0.1  # neighbors come from neighbors


def test_familiar_images_are_taken_for_every_class_in_turn():
    torch.manual_seed(0)
    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4)).eval()
    leaves = DeadLeaves((1, 8, 8))
    torch.manual_seed(1)
    start = leaves.sample(40)[0]
    torch.manual_seed(1)
    images, labels = Familiar(leaves, teacher, 4).sample(40)
    assert labels is None
    assert not images.requires_grad
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert images.amin() >= start.amin()
    assert images.amax() <= start.amax()
    wanted = torch.arange(40) % 4
    right = [(teacher(x).argmax(1) == wanted).float().mean() for x in (start, images)]
    assert right[1] > 0.9 > right[0]
    torch.manual_seed(1)
    with torch.no_grad():  # as pools draw
        assert torch.equal(Familiar(leaves, teacher, 4).sample(40)[0], images)
    near = Familiar(leaves, teacher, 4, steps=1)
    torch.manual_seed(1)
    assert (near.sample(40)[0] - start).abs().mean() < (images - start).abs().mean()


@pytest.mark.parametrize(
    ("source", "classes", "steps", "error", "name"),
    [
        (DeadLeaves((1, 8, 8)), 5, 1, ValueError, "num_classes"),
        (DeadLeaves((1, 8, 8)), 4, 0, ValueError, "steps"),
        (torch.zeros(3, 1, 8, 8), 4, 1, TypeError, "source"),
    ],
)
def test_familiar_refuses_by_name(source, classes, steps, error, name):
    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4))
    with pytest.raises(error, match=name):
        Familiar(source, teacher, classes, steps)
