"""Words into numbers: the tokenizer and the text encoders."""
