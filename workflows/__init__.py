"""The order of the stages: one file for each branch of the tuning guide's decision tree, and train_float."""
