"""The thin reference latent action model."""
