"""What model files may build on: packed layouts, the attention and block seams, and the small maths between them."""
