"""What the model of a checkpoint does on a text, as it is and without some of its heads."""
