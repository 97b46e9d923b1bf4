"""Writers of image files in which every field can be set; one format each, without cases."""
