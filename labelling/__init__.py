"""Models that look at pictures: what they name, find, outline and describe, each behind one interface."""
