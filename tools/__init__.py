"""Programs around the model: train, check, evaluate, draw. Nothing imports them but each other and the tests."""
