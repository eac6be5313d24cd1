"""MovieLens as GroupLens packs it.

`ratings.csv` and `movies.csv` (ml-latest, ml-25m, …), or `ratings.dat` and `movies.dat` (ml-1m, ml-10m), whose cells
are `::` apart, or `u.data` and `u.item` (ml-100k), with tabs and `|`, and a column of 0 and 1 a genre.

A row is a rating; its label is 1 if it is 4 stars or more. There are no impressions in the data: the other examples are
what the same users rated lower, which they chose to watch all the same, so an AUC here says how well liked is told from
watched and disliked, and nothing of what was never looked at. Every rating is an event, whose `action` is twice its
stars.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kvcast.train.columns import Columns, Ids, LogError, OnBadRows, read_csv, read_separated
from kvcast.train.readers.vocabulary import RawLog, Values, find_places, look_up

RATINGS = ("userId", "movieId", "rating", "timestamp")
MOVIES = ("movieId", "title", "genres")
LIKED_STARS = 4
NO_GENRES = "(no genres listed)"
# The columns of u.item; one of no genre is 1 in the first.
GENRES = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"),
    *("Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
FILM = ("movieId", "title", "release", "video", "url", *GENRES)
YEAR = r"\((?P<year>[0-9]{4})[^()]*\)\s*$"


def read_movielens(folder: Path, bad_rows: OnBadRows) -> RawLog:
    """Read ratings and movies.

    Offers the fields `item` (movie), `category` (its first genre), `genres` (all of them, as one value), `year`, and
    `action`.

    Raises:
        LogError: the files are not there, or not as documented; a row is bad and `bad_rows` is "stop".
    """
    if (folder / "u.data").is_file():
        ratings, movies = read_separated(folder / "u.data", "\t", RATINGS), _read_films(folder / "u.item")
    else:
        ratings, movies = _read_file(folder, "ratings", RATINGS), _read_file(folder, "movies", MOVIES)
    user, movie = ratings.read_integers("userId"), ratings.read_integers("movieId")
    twice_stars = 2 * ratings.read_numbers("rating", 0.5, 5)
    ratings.reject(
        "rating", "is not a number of half stars", (twice_stars != np.floor(twice_stars)) & (twice_stars > 0)
    )
    time = ratings.read_integers("timestamp")
    ratings.reject("timestamp", "is negative", time < 0)
    ratings.settle(bad_rows)
    good = ratings.good
    action = twice_stars[good].astype(np.int64)
    values, titles, unlisted = _describe_movies(movies, movie[good], bad_rows)
    notes = [f"{unlisted} ratings are of movies that {movies.path.name} does not list"] if unlisted else []
    return RawLog(
        user=user[good],
        time=time[good],
        label=(action >= 2 * LIKED_STARS).astype(np.int64),
        values=values,
        ids={"action": action},
        notes=(*ratings.describe_skipped(), *movies.describe_skipped(), *notes),
        titles=titles,
    )


def _read_file(folder: Path, name: str, names: tuple[str, ...]) -> Columns:
    comma, colons = folder / f"{name}.csv", folder / f"{name}.dat"
    if comma.is_file():
        return read_csv(comma, names)
    if colons.is_file():
        return read_separated(colons, "::", names)
    raise LogError(f"{folder}: expected {comma.name}, {colons.name} or u.data, found none")


def _read_films(path: Path) -> Columns:
    """Read `u.item`; its genres become one column, as in the other formats."""
    films = read_separated(path, "|", FILM)
    flags = np.stack([films.read_flags(name) for name in GENRES[1:]], axis=1)
    genres = ["|".join(name for name, flag in zip(GENRES[1:], row, strict=True) if flag) for row in flags]
    films.table = films.table.append_column("genres", pa.array(genres, pa.string()))
    return films


def _describe_movies(movies: Columns, rated: Ids, bad_rows: OnBadRows) -> tuple[dict[str, Values], dict[str, str], int]:
    """Return the values of each rating's movie, the titles, and how many ratings are of movies that are not listed."""
    movie = movies.read_integers("movieId")
    movies.settle(bad_rows)
    table, movie = movies.table.filter(pa.array(movies.good)), movie[movies.good]
    title, genres = pc.fill_null(table["title"], ""), pc.fill_null(table["genres"], NO_GENRES)
    year = pc.struct_field(pc.extract_regex(title, YEAR), "year")
    numbers, row = np.unique(rated, return_inverse=True)
    place = find_places(movie, numbers)[row]
    values = {
        "item": Values(tuple(str(number) for number in numbers), row),
        "category": look_up(pc.list_element(pc.split_pattern(genres, "|"), 0), place, ("", NO_GENRES)),
        "genres": look_up(genres, place, ("", NO_GENRES)),
        "year": look_up(year, place),
    }
    titles = dict(zip((str(number) for number in movie), title.to_pylist(), strict=True))
    return values, titles, int((place < 0).sum())
