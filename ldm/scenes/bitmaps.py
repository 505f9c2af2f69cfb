"""The objects once more, drawn by hand on the 4-pixel grid for the pixel-art style.

Shrinking a smooth drawing to eight cells makes a smudge, so pixel artists place every cell
by hand; so do we. Letters are inks (see `shapes.py`):

    m main colour   d darker   l lighter   w wood    g leaf   b glass
    c cream         t tyre     h heart     # outline . nothing

A ring of outline cells is laid round each drawing afterwards, which makes the small ones
nine cells (36 pixels) and the large ones fifteen cells (60 pixels) in their larger extent.
"""

from .shapes import CREAM, DARK, GLASS, HEART, LEAF, LIGHT, LINE, MAIN, NONE, TYRE, WOOD

LETTERS = {
    ".": NONE,
    "#": LINE,
    "m": MAIN,
    "d": DARK,
    "l": LIGHT,
    "w": WOOD,
    "g": LEAF,
    "b": GLASS,
    "c": CREAM,
    "t": TYRE,
    "h": HEART,
}

SMALL = {
    "house": "...d... ..ddd.. .ddddd. ddddddd .mbmbm. .mmwmm. .mmwmm.",
    "tree": "..mmm.. .mlmmm. mmmmmmm mmmmmdm ...w... ...w... ..www..",
    "flower": ".mm.mm. .mmhmm. mmhhhmm .mmhmm. .mm.mm. g..g..g .ggggg.",
    "boat": "...wm.. ..cwmm. ..cwmm. .ccwmmm ...w... mmmmmmm .mmmmm.",
    "car": ".mmmmm. .bbmbb. mmmmmmm mtmmmtm .t...t.",
    "balloon": "..mmm.. .mdmdm. mmdmdmm mmdmdmm .mmmmm. ...m... ..www..",
    "star": "...m... ...m... mmmmmmm .mmlmm. ..mmm.. .mm.mm. .m...m.",
    "fish": "..mmm.d .mmmmdd mtmlmd. .mmmmdd ..mmm.d",
    "mushroom": "..mmm.. .mcmmm. mmmmmcm mcmmmmm mmmmmmm ..ccc.. ..ccc..",
}

LARGE = {
    "house": """
        ......d......
        .....ddd.dd..
        .....ddd.dd..
        ....ddddddd..
        ...dddddddd..
        ..ddddddddd..
        .ddddddddddd.
        ddddddddddddd
        .mmmmmmmmmmm.
        .mbbmmmmmbbm.
        .mbbmwwwmbbm.
        .mmmmwwwmmmm.
        .mmmmwwwmmmm.""",
    "tree": """
        ....mmm....
        ...mllmm...
        .mmmllmmmm.
        mmmmmmmmmmm
        mllmmmmmddm
        mmmmmmmmddm
        .mmmmmmmmm.
        ..mmddmmm..
        .....w.....
        .....w.....
        .....w.....
        ....www....
        ...wwwww...""",
    "flower": """
        ..mmm.mmm..
        .mmmm.mmmm.
        .mmmmmmmmm.
        mm#mmhmm#mm
        mmmmhhhmmmm
        .mmhhhhhmm.
        mmmmhhhmmmm
        mm#mmhmm#mm
        .mmmm.mmmm.
        ..mmm.mmm..
        gg...g...gg
        .ggg.g.ggg.
        ...ggggg...""",
    "boat": """
        .....w.......
        .....wm......
        ....cwmm.....
        ....cwmmm....
        ...ccwmmm....
        ...ccwmmmm...
        ..cccwmmmmm..
        .ccccwmmmmmm.
        .....w.......
        mmmmmmmmmmmmm
        mdddddddddddm
        .mmmmmmmmmmm.
        ..mmmmmmmmm..""",
    "car": """
        ...mmmmmm....
        ..mbbmbbbm...
        .mbbbmbbbmm..
        mmmmmmmmmmmmm
        mmmmmmmmmmmmm
        mtttdddddtttm
        mtctmmmmmtctm
        .ttt.....ttt.""",
    "balloon": """
        ...mmmmm...
        .mmddmddmm.
        .mddmmmddm.
        mmddmmmddmm
        mmddmmmddmm
        mmddmmmddmm
        .mddmmmddm.
        .mmddmddmm.
        ..mmmmmmm..
        ...lllll...
        ...#...#...
        ....www....
        ....www....""",
    "star": """
        ......m......
        .....mmm.....
        .....mmm.....
        ....mmmmm....
        mmmmmmlmmmmmm
        .mmmmlllmmmm.
        ..mmlllllmm..
        ...mmlllmm...
        ...mlllllm...
        ..mmmmlmmmm..
        ..mmmmmmmmm..
        ..mmmm.mmmm..
        .mmm.....mmm.""",
    "fish": """
        ....ddd......
        ..mmmmmm...dd
        .mmmmmmmm.ddd
        mmctmmdmmmdd.
        mmttmmmdmmmd.
        mmmmmmdmmmdd.
        .mllllmmm.ddd
        ..mmmmmm...dd
        ....dd.......""",
    "mushroom": """
        ....mmmmm....
        ..mmmmccmmm..
        .mmmmmccmmmm.
        .mccmmmmmmmm.
        mmccmmmmmccmm
        mmmmmmmmmccmm
        mmmmmccmmmmmm
        mmmmmccmmmmmm
        .mmmmmmmmmmm.
        ....ccccc....
        ....ccccc....
        ....ccccc....
        ....ccccc....""",
}


def bitmap(kind: str, size: str) -> list[list[int]]:
    """Ink numbers of one object, row by row, without the ring of outline."""
    drawing = (SMALL if size == "small" else LARGE)[kind]
    return [[LETTERS[letter] for letter in row] for row in drawing.split()]
