"""Words for objects: phrasings that mean the same, and labels that are common on roads and indoors.

No torch here: the command line lists them.
"""

from __future__ import annotations

from collections.abc import Sequence

PHRASINGS: tuple[tuple[str, ...], ...] = (
    ("pedestrian", "person", "human", "standing person", "walking person"),
    ("cyclist", "bicyclist", "person riding a bicycle", "bike rider"),
    ("motorcyclist", "person riding a motorcycle", "motorcycle rider"),
    ("car", "automobile", "passenger car", "sedan"),
    ("truck", "lorry", "heavy goods vehicle"),
    ("bus", "city bus", "coach bus"),
    ("van", "minivan", "delivery van"),
    ("motorcycle", "motorbike", "motor scooter"),
    ("bicycle", "bike", "pushbike"),
    ("traffic sign", "road sign", "street sign"),
    ("traffic light", "traffic signal", "stoplight"),
    ("traffic cone", "road cone", "safety cone"),
    ("barrier", "road barrier", "crash barrier", "guard rail"),
    ("pole", "post", "utility pole"),
    ("street lamp", "street light", "lamppost"),
    ("trash can", "rubbish bin", "dustbin", "garbage can"),
    ("sofa", "couch", "settee"),
    ("television", "tv", "television set"),
    ("wardrobe", "closet", "clothes cupboard"),
    ("refrigerator", "fridge"),
    ("potted plant", "houseplant", "indoor plant"),
    ("bookcase", "bookshelf", "shelves"),
    ("phone", "telephone", "mobile phone", "cell phone"),
)
"""Each a label and others that people give the same objects; no phrasing is in two of them."""

COMMON_LABELS: dict[str, tuple[str, ...]] = {
    "road": (
        *("car", "truck", "bus", "van", "trailer", "construction vehicle", "tram", "train"),
        *("motorcycle", "bicycle", "scooter", "pedestrian", "cyclist", "motorcyclist"),
        *("wheelchair", "stroller", "animal", "dog", "traffic sign", "traffic light"),
        *("traffic cone", "barrier", "fence", "railing", "pole", "street lamp", "tree"),
        *("tree trunk", "bush", "hedge", "vegetation", "building", "house", "wall", "window"),
        *("door", "roof", "bridge", "tunnel", "road", "sidewalk", "curb", "ground", "grass"),
        *("fire hydrant", "mailbox", "trash can", "bench", "bollard", "bus stop", "noise"),
    ),
    "indoor": (
        *("chair", "armchair", "sofa", "stool", "table", "coffee table", "desk", "bed"),
        *("nightstand", "dresser", "wardrobe", "cabinet", "bookcase", "shelf", "counter"),
        *("refrigerator", "oven", "microwave", "washing machine", "dishwasher", "sink"),
        *("toilet", "bathtub", "shower", "mirror", "radiator", "lamp", "ceiling lamp"),
        *("fan", "television", "monitor", "computer", "keyboard", "laptop", "printer", "phone"),
        *("clock", "picture", "curtain", "pillow", "rug", "potted plant", "vase", "cup"),
        *("bottle", "bowl", "plate", "box", "bag", "book", "piano", "guitar", "ball", "toy"),
        *("shoes", "clothes", "stairs", "column", "floor", "ceiling", "pipe", "cable"),
    ),
}
"""Labels that are common in scans, by part. `budwood points embed` embeds them."""


def alike(labels: Sequence[str]) -> list[tuple[str, ...]]:
    """The phrasings of each label, over which its text embedding is averaged.

    A label that has no others is alone. So is one of which another phrasing is among the labels:
    they are to be told apart.

    Args:
        labels: distinct labels; case, underscores and a plural's s make no difference.
    """
    groups = [_group(label) for label in labels]
    return [
        (label,) if group is None or groups.count(group) > 1 else PHRASINGS[group]
        for label, group in zip(labels, groups)
    ]


def _group(label: str) -> int | None:
    word = " ".join(label.replace("_", " ").split()).casefold()
    for form in (word, word.removesuffix("s")):
        if form in _GROUPS:
            return _GROUPS[form]
    return None


_GROUPS = {phrase: i for i, phrases in enumerate(PHRASINGS) for phrase in phrases}
