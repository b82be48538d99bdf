"""What runs after what: a file for each branch of the guide's decision tree; and train_float."""
