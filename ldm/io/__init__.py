"""Files: weights, JSON, PNG with its settings; read strictly, written whole or not at all."""
