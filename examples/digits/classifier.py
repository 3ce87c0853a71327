"""An independent judge of the generated digits: a support vector machine on real ones."""

from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from torch import Tensor

from examples.digits.data import digits


class DigitClassifier:
    """RBF support vector machine trained on 80% of the digits; the rest gives `held_out`."""

    held_out: float

    def __init__(self) -> None:
        pictures, labels = digits()
        x_train, x_test, y_train, y_test = train_test_split(
            pictures.flatten(1).numpy(), labels.numpy(), test_size=0.2, random_state=0
        )
        self.svm = SVC(gamma=0.064, C=10.0).fit(x_train, y_train)
        self.held_out = float(self.svm.score(x_test, y_test))

    def accuracy(self, pictures: Tensor, labels: Tensor) -> float:
        """Share of pictures [B, 1, 8, 8] recognised as their labels [B]."""
        return float(self.svm.score(pictures.flatten(1).numpy(), labels.numpy()))
