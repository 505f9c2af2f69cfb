"""Captions: the same scene said in many ways, and never anything untrue.

A caption is built from phrases: the subject (the things and how they stand to each other),
the ground, the time, the mountains and the style. Each phrase has a few wordings; then the
phrases are put into one of a few orders.
"""

from .world import SKY_KINDS, Scene, Thing, box, generator, pick

# The first wording of each is the canonical word, the only one used when full=True.
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}

TIME_WORDS = {
    "day": ("by day", "during the day", "in the daytime"),
    "sunset": ("at sunset", "at sunset", "in the evening"),
    "night": ("at night", "by night", "at night"),
    "dawn": ("at dawn", "at dawn", "in the early morning"),
}
GROUND_WORDS = {
    "grass": ("on grass", "on the grass", "in the grass"),
    "sand": ("on sand", "on the sand", "in the sand"),
    "snow": ("on snow", "on the snow", "in the snow"),
    "sea": ("on the sea", "at sea", "on the sea"),
}
MOUNTAIN_WORDS = ("with mountains", "mountains behind", "in front of mountains")
STYLE_BEFORE = {
    "watercolor": ("a watercolor of", "watercolor of"),
    "pixel art": ("pixel art of", "a pixel art picture of"),
    "pencil sketch": ("a pencil sketch of", "pencil sketch of"),
    "neon": ("a neon picture of", "neon picture of"),
}
STYLE_AFTER = {
    "watercolor": ("watercolor", "in watercolor", "watercolor painting"),
    "pixel art": ("pixel art", "as pixel art", "in pixel art style"),
    "pencil sketch": ("pencil sketch", "as a pencil sketch", "pencil sketch"),
    "neon": ("neon", "in neon", "neon style"),
}


def relation(scene: Scene) -> str | None:
    """Where the first of two things is, seen from the second; None for a single thing."""
    if len(scene.things) < 2:
        return None
    first, second = scene.things[:2]
    return "to the left of" if first.x < second.x else "to the right of"


def caption(scene: Scene, seed: int, full: bool = False) -> str:
    """Describe a scene; another `seed` words it differently.

    full=False mostly names everything but now and then leaves out a size, the time, the
    ground, the mountains or the relation. Kinds, colours and the style are always named
    (a plain picture is one whose style is not named).
    full=True names every attribute, in canonical words and varying order.
    """
    rng = generator(seed, 30)
    style = scene.style if scene.style != "plain" else None
    tagged = rng.random() < 0.2  # "night, snow, a big red house"
    where, when, behind = surroundings(rng, scene, full, tagged)
    subject = say_things(rng, scene, full)
    text = say_tags(rng, subject, where, when, behind) if tagged else say_sentence(rng, subject, where, when, behind)
    if style is None:
        return text
    # "a watercolor of at night ..." is no English, so the "of" form needs the subject first.
    if text.startswith(subject) and rng.random() < 0.4:
        return f"{pick(rng, STYLE_BEFORE[style])} {text}"
    if tagged and rng.random() < 0.4:
        return f"{style}, {text}"
    return f"{text}, {pick(rng, STYLE_AFTER[style])}"


def surroundings(rng, scene: Scene, full: bool, tagged: bool):
    """Wordings of ground, time and mountains; None for what is left unsaid."""
    where = when = behind = None
    if full or rng.random() < 0.93:
        where = scene.ground if tagged else word(rng, GROUND_WORDS[scene.ground], full)
        floating = all(t.kind in SKY_KINDS + ("fish",) for t in scene.things)
        if floating and not tagged and rng.random() < 0.6:
            where = f"over the {scene.ground}"
    if full or rng.random() < 0.93:
        when = scene.time if tagged else word(rng, TIME_WORDS[scene.time], full)
    if scene.mountains and (full or rng.random() < 0.85):
        behind = "mountains" if tagged else pick(rng, MOUNTAIN_WORDS)
    return where, when, behind


def word(rng, wordings, full: bool) -> str:
    """One of the wordings, or the canonical first one when everything must be plain to read."""
    return wordings[0] if full else pick(rng, wordings)


def say_tags(rng, subject, where, when, behind) -> str:
    """Commas only: "night, snow, a big red house" in any order."""
    tags = [tag for tag in (where, when, behind) if tag]
    tags = [tags[i] for i in rng.permutation(len(tags))]
    place = int(rng.integers(3))
    tags = [subject] + tags if place == 0 else tags + [subject] if place == 1 else tags[:1] + [subject] + tags[1:]
    return ", ".join(tags)


def say_sentence(rng, subject, where, when, behind) -> str:
    """One flowing phrase: the subject first, or the place and time first."""
    comma = "," if behind == "mountains behind" else ""
    behind_part = f"{comma} {behind}" if behind else ""
    order = [part for part in (where, when) if part]
    if rng.random() < 0.4:
        order.reverse()
    if order and rng.random() < 0.25:  # "at night on snow, a red house with mountains"
        return f"{' '.join(order)}, {subject}{behind_part}"
    if behind and rng.random() < 0.4:  # "a red house with mountains, on snow at night"
        return ", ".join([f"{subject}{behind_part}"] + ([" ".join(order)] if order else []))
    return " ".join([subject] + order) + behind_part


def say_things(rng, scene: Scene, full: bool) -> str:
    """The subject: one thing, or two and how they stand to each other."""
    names = [say_thing(rng, thing, full) for thing in scene.things]
    if len(names) == 1:
        return names[0]
    left, right = (0, 1) if scene.things[0].x < scene.things[1].x else (1, 0)
    chance = rng.random()
    if not full and chance < 0.18:  # no relation at all
        a, b = (0, 1) if rng.random() < 0.5 else (1, 0)
        return f"{names[a]} {pick(rng, ('and', 'and', 'next to'))} {names[b]}"
    if not full and chance < 0.26:
        upper = above(scene)
        if upper is not None:
            a, b, how = (upper, 1 - upper, "above") if rng.random() < 0.6 else (1 - upper, upper, "below")
            return f"{names[a]} {how} {names[b]}"
    if chance > 0.85:
        return f"{names[left]} on the left and {names[right]} on the right"
    if rng.random() < 0.5:
        return f"{names[left]} {pick(rng, ('to the left of', 'left of'))} {names[right]}"
    return f"{names[right]} {pick(rng, ('to the right of', 'right of'))} {names[left]}"


def above(scene: Scene) -> int | None:
    """The index of the thing that is clearly above the other, if one floats in the sky."""
    if not any(t.kind in SKY_KINDS for t in scene.things):
        return None
    (_, _, _, bottom0), (_, _, _, bottom1) = box(scene, 0), box(scene, 1)
    if abs(scene.things[0].y - scene.things[1].y) < 20 or abs(bottom0 - bottom1) < 20:
        return None
    return 0 if bottom0 < bottom1 else 1


def say_thing(rng, thing: Thing, full: bool) -> str:
    """ "a large red house"; the size is left out three times in ten."""
    words = [thing.color, thing.kind]
    if full or rng.random() < 0.7:
        words.insert(0, word(rng, SIZE_WORDS[thing.size], full))
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article] + words)
