"""The exercises of the notebooks: module n06 holds those of notebook 06 as `EXERCISES`, {"06.1": Exercise, ...}."""
