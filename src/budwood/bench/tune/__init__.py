"""The comparison of fine-tuning methods: learning and forgetting."""
