"""The Hugging Face hub: a name becomes files on this machine, through huggingface_hub, which is imported on use.

zoo.py, zoo.toml   addresses ("org/name@revision"), and the one table of models with short names
wanted.py          which of a repository's files ldm reads
client.py          huggingface_hub itself, and its errors in sentences
download.py        one file into its cache: gone on with where it was cut off, its hash checked
fetching.py        all together: what is here (`local`), what is to be fetched (`plan`), and fetching it (`fetch`)
"""

from ldm.hub.client import Vanished
from ldm.hub.fetching import fetch, local
from ldm.hub.zoo import parse

__all__ = ["Vanished", "fetch", "local", "parse"]
