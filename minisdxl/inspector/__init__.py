"""The inspector: records what happens inside a picture's denoising, and shows it in one self-contained page."""
