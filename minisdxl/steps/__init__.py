"""Step plans: which steps of a run evaluate the U-Net, how deep, with which guidance, and what is kept between them."""
