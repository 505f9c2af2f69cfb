"""How good is a model: `evaluation` has a checker read what pictures show, and holds it against what was asked for."""
