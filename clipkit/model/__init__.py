"""Towers, the dual encoder, its embeddings and its teacher."""
