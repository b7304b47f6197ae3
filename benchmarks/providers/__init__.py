"""What a suite compares: this project, and flow_grpo's code in its eager and its compiled form."""
