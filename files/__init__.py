"""Files, whatever is in them: one writer that leaves nothing in halves, and the quiet opening of models' files."""
