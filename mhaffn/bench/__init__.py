"""``mhaffn bench``: a machine measured sublayer by sublayer, the document of it, and two of them compared."""
