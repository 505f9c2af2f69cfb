"""What people add to a model: LoRAs to its weights, embeddings to its words; and take away again, bit for bit.

    pipe.add_lora("style.safetensors", 0.8)             # says how many weights change, and by how much
    pipe.add_lora("scenes-neon", 0.5)                   # any number of them: their changes are summed
    pipe.loras                                          # what is on, and at which weight
    pipe.remove_lora("style")                           # the weights are what they would be had it never been there

    with pipe.lora("style.safetensors", 0.7):           # for as long as the block lasts
        pipe("a house on snow").images[0]

    pipe.add_embedding("scenes-mushroom")               # a word: its vectors go to every text encoder it has some for

LoRAs are `ldm.lora`'s, words `ldm.text.embeddings`'.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm.checkpoints.places import EMBEDDING, LORA, find_file
from ldm.errors import LDMError
from ldm.lora import applied
from ldm.lora.applied import Applied
from ldm.lora.file import Lora, open_lora
from ldm.memory import send_home
from ldm.parts import Parts
from ldm.text import embeddings
from ldm.text.embeddings import Embedding, open_embedding


class Added(Parts):
    """Parts to which LoRAs and embeddings are added. `loras` and `embeddings` hold those that are on."""

    def add_lora(
        self, lora: str | Path | Lora, weight: float = 1.0, merge: bool = True, allow_pickle: bool = False
    ) -> Applied:
        """Add `weight` times the changes of a LoRA: a file, its folder, an embedded one's name, or one that is open.

        `merge` writes them into the weights: nothing is slower afterwards. Without it they are computed beside each
        layer, y = Wx + weight * BAx, and the weights stay as they are. The numbers are the same within rounding:
        merged, a weight of half precision is rounded once more (27 of 255 grey levels at most, 2.3 on average, in a
        picture of the embedded model in bfloat16).
        Says on stderr what changes and how large that is. Raises LDMError, and leaves the model as it is, for a file
        that isn't sound, or that was made for another model.
        """
        opened = lora if isinstance(lora, Lora) else open_lora(find_file(lora, LORA), allow_pickle)
        return applied.add(self, opened, weight, merge)

    def remove_lora(self, lora: Applied | str) -> None:
        """Take a LoRA away: what `add_lora` returned, or its name. With the last, every weight is the very same again.

        Raises LDMError for one that isn't on.
        """
        applied.remove(self, lora)

    @contextmanager
    def lora(
        self, lora: str | Path | Lora, weight: float = 1.0, merge: bool = True, allow_pickle: bool = False
    ) -> Iterator[Applied]:
        """`add_lora`, for as long as the block lasts."""
        added = self.add_lora(lora, weight, merge, allow_pickle)
        try:
            yield added
        finally:
            if added in self.loras:
                self.remove_lora(added)

    def add_embedding(
        self, embedding: str | Path | Embedding, word: str | None = None, allow_pickle: bool = False
    ) -> Embedding:
        """Teach the text encoders a word (textual inversion): a file, its folder, an embedded name, or an open one.

        `word` is what prompts call it; left out, what its file does. Says on stderr which word it is. Raises LDMError,
        and leaves the model as it is, for vectors of another model, and for a word that is one already.
        """
        opened = embedding
        if not isinstance(embedding, Embedding):
            opened = open_embedding(find_file(embedding, EMBEDDING), allow_pickle)
        if self.flux and self.text_encoder_2 is not None:
            raise LDMError("FLUX reads its words from T5, and a learnt word is CLIP's: leave the embedding out.")
        send_home(self)
        return embeddings.add(self, opened, word)

    def remove_embedding(self, word: str) -> None:
        """Forget a word that `add_embedding` taught. Raises LDMError if there is none such."""
        send_home(self)
        embeddings.remove(self, word)

    @contextmanager
    def embedding(
        self, embedding: str | Path | Embedding, word: str | None = None, allow_pickle: bool = False
    ) -> Iterator[Embedding]:
        """`add_embedding`, for as long as the block lasts."""
        added = self.add_embedding(embedding, word, allow_pickle)
        try:
            yield added
        finally:
            if added.word in self.embeddings:
                self.remove_embedding(added.word)
