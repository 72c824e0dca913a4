"""Small programs for the people who keep the project: not part of training or evaluation."""
