BLAS: str
