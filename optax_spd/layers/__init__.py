"""What a layer is; parameter trees, masks, depths, and checks of arguments."""
