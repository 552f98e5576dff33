"""Fine-tuning methods compared (learning and forgetting), and their speed."""
