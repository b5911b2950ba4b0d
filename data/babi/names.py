"""Other names for the people, the rooms and the things of bAbI's stories.

    from data.babi.names import renamer
    rename = renamer("many", random.Random(1))
    rename("Mary got the milk there.")  # perhaps "Vera got the lantern there."

bAbI has few names, so a model that is trained on them can learn them by heart. With many names it
has to learn what stands where. Every fifth word of the lists below is held out: no fact, question
or answer of a lesson has it. So these words show whether the model has learned that. The prose
around the facts is not renamed, and may have any of the words.

The tasks of RENAMED can be told with other names: qa1 to qa14, and qa19. Stories of qa15 to qa18
are not about these people, rooms and things. In qa20 a room tells why somebody goes there, so its
name matters. Writes nothing.
"""

import random
import re
from collections.abc import Callable

from data.babi.story import ROOMS

CHOICES = ("own", "many", "unseen")
RENAMED = (*(f"qa{n}" for n in range(1, 15)), "qa19")

# The benchmark's metric looks for a word anywhere in a text, also inside another word. So no word
# here is a part of another one here, of bAbI's own words or of a question. None of them has another
# meaning in a task.
WOMEN = """
    Agatha Alice Amanda Angela Barbara Beatrice Betty Carol Clara Daisy Diana Dora Edith Emma Esther
    Eva Fiona Frances Gloria Grace Helen Hilda Ingrid Irene Iris Jane Judith Karen Kate Laura Linda
    Lucy Margaret Martha Megan Nina Olivia Rachel Rosa Ruth Sarah Sophie Susan Teresa Ursula Vera
    Wendy Zoe
"""
MEN = """
    Adam Albert Andrew Anthony Arthur Basil Charles David Douglas Edward Felix Frank George Harold
    Henry Hugo Ivan Jacob Karl Kevin Lawrence Leo Louis Marcus Martin Matthew Nathan Oliver Oscar
    Otto Patrick Peter Philip Ralph Raymond Robert Rupert Samuel Stephen Theodore Thomas Tobias
    Victor Walter William
"""
PLACES = """
    airport attic bakery barn basement cabin cafe canteen castle cave cellar chapel church classroom
    clinic closet cottage courtyard desert factory farm forest gallery garage gym harbor hospital
    hotel laboratory laundry library lobby lounge market meadow museum palace pantry pharmacy pool
    prison restaurant shed stable stadium station street studio temple theater tower tunnel valley
    village zoo
"""
THINGS = """
    anchor balloon banana basket blanket book bottle bowl bread brush bucket button camera candle
    carpet chair cheese clock coat coin cookie cup doll drum feather flag flute fork glove guitar
    hammer helmet jar kettle kite ladder lantern lemon magnet melon mirror necklace needle newspaper
    onion orange pear pencil pillow plate puzzle ribbon rope saddle scarf shovel spoon sword towel
    umbrella violin wallet whistle
"""

KINDS = (  # bAbI's own names of each kind, and the other ones
    # Some tasks say "he" and "she", so women and men are two kinds.
    (("Mary", "Sandra", "Julie"), WOMEN.split()),
    (("John", "Daniel", "Fred", "Bill", "Jeff"), MEN.split()),
    ((*ROOMS, "cinema", "park", "school"), PLACES.split()),
    (("apple", "football", "milk"), THINGS.split()),
)
OWN_WORD = re.compile(r"\b(" + "|".join(word for own, _ in KINDS for word in own) + r")\b")


def held_out(words: list[str]) -> list[str]:
    """Those words of a list that no lesson has."""
    return words[::5]


def for_lessons(words: list[str]) -> list[str]:
    """Those words of a list that lessons may have."""
    return [word for i, word in enumerate(words) if i % 5 != 0]


def renamer(names: str, rng: random.Random) -> Callable[[str], str]:
    """A function that replaces bAbI's names in the texts of one story.

    names  "many" draws the new names from bAbI's own and the words for lessons, "unseen" from the
           words that are held out

    Each of bAbI's names gets a new one of its own. A woman gets a woman's name, a man a man's."""
    new_name = {}
    for own, words in KINDS:
        if names == "many":
            candidates = [*own, *for_lessons(words)]
        else:
            candidates = held_out(words)
        new_name.update(zip(own, rng.sample(candidates, len(own)), strict=True))

    def rename(text: str) -> str:
        return OWN_WORD.sub(lambda match: new_name[match[0]], text)

    return rename
