"""Records of measurements, and the tables and pictures that are made from them."""
