"""Next-item recommendation: sequences as tensors, models, losses, metrics, retrieval, and the
published artifact.

Tensors carry their axes in their names, one letter an axis:

    B  sequences in a batch        I  catalogue rows (padding and mask included)
    L  positions                   K  results
    D  model width                 T  packed tokens
    H  heads                       M  scored positions
    N  negatives                   F  context fields
    U  users                       C  codes of an item
    V  values of a code            E  width of a centroid

An `item_id` is the shop's own key; an `item` is its dense index in the catalogue.
"""
