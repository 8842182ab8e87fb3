"""Rows of text alone: what their records (data/records.py) have in the place of an image.

`image` is None, and `image_id` is one that no other record of the same data has and that no image can have: a path
within a folder, a digest and the id of an official file never begin with a slash. So whatever goes by `image_id`
(drawing and holding out whole images, intervals that take images as independent) takes such a record for itself.
"""

MARK = "/no image/"


def own_image_id(id: str) -> str:
    """The `image_id` of a record without an image."""
    return MARK + id


def names_image(image_id: str) -> bool:
    """Whether an `image_id` is that of an image."""
    return not image_id.startswith(MARK)
