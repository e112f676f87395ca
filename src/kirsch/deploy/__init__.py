"""Export models to files, run the files, and measure them."""
