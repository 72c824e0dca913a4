"""One LightningModule for each conditioning method, thin on purpose, over one shared training step."""
