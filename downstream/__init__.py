"""What few labels buy: features, probes, controls, fine-tuning, and the statistics that judge them."""
