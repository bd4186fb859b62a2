/* keys.pml: changes of several slots, two kinds of keys, and guests that make changes themselves.
 *
 * Leases, sessions and the table's life are in strict.pml; here no time passes and nobody dies. One daemon, NG guests
 * (kernel cache, agent, recall thread, reader), writers that are the host or a guest (the *origin*), and three inodes:
 * a directory P with the names n -> c and m -> d.
 *
 *   op       what it does               its slots   keys that it recalls (A: attributes, N: names that lead there)
 *   CHMOD    of c                       c           A(c)
 *   CHMOD_D  of d                       d           A(d)
 *   CREATE   of some other name in P    P           A(P)
 *   UNLINK   of n (whatever it is)      P, c or d   A(P), A and N of what n leads to
 *   RENAME   of m over n                P, c, d     A and N of c and d, A(P)
 *
 * Each object (attributes of P, c, d; names n, m) holds the number of the last change that touched it. A read may return
 * nothing older than the changes which were acknowledged, or seen by a completed read of ANY object, before it began:
 * a change of several objects happens at one instant.
 *
 * One step is one memory access or one section under a lock that nobody sees half-way. Messages wait for any time and
 * overtake each other, except that a REGISTER does not overtake an earlier RELEASE (stream sockets).
 */
#ifndef NG
#define NG 1
#endif
#ifndef NR                      /* reads by each guest's reader */
#define NR 2
#endif
#ifndef READS                   /* what readers may look at, a set of objects */
#define READS (OBJ_C | OBJ_N)
#endif
#ifndef W0                      /* the writers: an operation and who makes it (NG: the host) */
#define W0 UNLINK
#endif
#ifndef O0
#define O0 NG
#endif
#ifndef O1
#define O1 NG
#endif
#ifndef O2
#define O2 NG
#endif
#define CHMOD 1
#define CHMOD_D 2
#define CREATE 3
#define UNLINK 4
#define RENAME 5

#define EVEN(w) (((w) & 1) == 0)
#define MAX(a,b) ((a) > (b) -> (a) : (b))

/* inodes, objects and keys: bit s of a set of inodes, objects P c d n m, keys A(P) A(c) A(d) N(c) N(d) */
#define P 0
#define C 1
#define D 2
#define NOTHING 3
#define OBJ_P 1
#define OBJ_C 2
#define OBJ_D 4
#define OBJ_N 8
#define OBJ_M 16
#define NAME_OBJ(i) (OBJ_N << (i))
#ifdef SHARED_SLOT              /* c and d have the same slot */
#define SLOT(s) ((s) == D -> C : (s))
#else
#define SLOT(s) (s)
#endif
#define A(s) (1 << SLOT(s))
#ifdef ONE_KEY
#define N(s) A(s)
#else
#define N(s) (4 << SLOT(s))
#endif
#define NK 5

/* ---- table, truth, observer ---- */
byte word[3], infl[3];
byte applied;                   /* changes applied so far */
byte attr_of[3], name_of[2];    /* number of the last change of each object */
byte leads[2] = C;              /* where n and m lead: c, d, NOTHING */
byte touched[5];                /* objects that change number i touched */
byte known;                     /* the highest number that somebody knows of */
bool dir_held;                  /* the export's kernel holds P: one change of its names at a time */
/* ---- daemon ---- */
byte sharer[NG];                /* keys */
byte sent[NG], acked[NG];       /* recalls: serial of the last one, acknowledged (cumulative) */
byte last[NG * NK];             /* serial of the last recall of each key */
/* ---- messages under way, as sets of keys ---- */
byte m_reg[NG], m_old[NG];      /* REGISTER: of the current generation, of one that is over */
byte m_conf[NG];                /* CONFIRM of the current generation (others are ignored) */
byte m_rel[NG], m_recall[NG];
bool m_names[NG];               /* ONE_KEY: the recall says that names went, too */
/* ---- agent ---- */
bool lock[NG];                  /* the grant lock */
byte reg[NG];                   /* registered and confirmed */
byte own[NG * 3];               /* own changes in flight, per slot */
byte book_a[NG], book_n[NG];    /* BOOKS: what it believes its kernel has: inodes, names */
byte grants[NG];                /* BOOKS: numbers them; of the latest of each inode and name: */
byte grant_a[NG * 3], grant_n[NG * 2];
/* ---- kernel of the guest ---- */
byte k_attr[NG], k_attr_of[NG * 3];
byte k_name[NG], k_leads[NG * 2], k_name_of[NG * 2];

inline unregister(g, keys) {    /* under the grant lock; a new generation for these keys */
  reg[g] = reg[g] & ~(keys);
  m_old[g] = m_old[g] | (m_reg[g] & (keys));
  m_reg[g] = m_reg[g] & ~(keys);
  m_conf[g] = m_conf[g] & ~(keys)
}
/* the names among `which` that lead to an inode whose names key is in `keys` */
#define NAME_IN(g, i, keys) ((k_name[g] & (1 << (i))) && (N(k_leads[(g) * 2 + (i)]) & (keys)))
inline forget_attributes(g, inodes) {
  k_attr[g] = k_attr[g] & ~(inodes);
  if :: !(k_attr[g] & 1) -> k_attr_of[(g) * 3] = 0 :: else fi;
  if :: !(k_attr[g] & 2) -> k_attr_of[(g) * 3 + 1] = 0 :: else fi;
  if :: !(k_attr[g] & 4) -> k_attr_of[(g) * 3 + 2] = 0 :: else fi
}
inline forget_name(g, i) {
  k_name[g] = k_name[g] & ~(1 << (i)); k_leads[(g) * 2 + (i)] = 0; k_name_of[(g) * 2 + (i)] = 0
}
inline forget_names(g, which) {
  if :: (which) & 1 -> forget_name(g, 0) :: else fi;
  if :: (which) & 2 -> forget_name(g, 1) :: else fi
}

/* What a recall, or a self-recall, of `keys` has to drop: all, or what the books say. */
inline take(g, keys, names_too) {
  inodes = 0; names = 0;
  if :: (keys) & A(P) -> inodes = inodes | 1 << P :: else fi;
  if :: (keys) & A(C) -> inodes = inodes | 1 << C :: else fi;
#ifdef ONE_INODE                /* control: a recalled slot is taken for one inode */
  if :: ((keys) & A(D)) && !(k_attr[g] & (inodes & ~1)) -> inodes = inodes | 1 << D :: else fi;
#else
  if :: (keys) & A(D) -> inodes = inodes | 1 << D :: else fi;
#endif
  if :: names_too && NAME_IN(g, 0, keys) -> names = names | 1 :: else fi;
  if :: names_too && NAME_IN(g, 1, keys) -> names = names | 2 :: else fi;
#ifdef BOOKS
  inodes = inodes & book_a[g]; names = names & book_n[g];
#ifdef BOOKS_EMPTIED            /* control: struck out before the kernel has forgotten */
  book_a[g] = book_a[g] & ~inodes; book_n[g] = book_n[g] & ~names;
#else
  numbers[0] = grant_a[(g) * 3]; numbers[1] = grant_a[(g) * 3 + 1]; numbers[2] = grant_a[(g) * 3 + 2];
  numbers[3] = grant_n[(g) * 2]; numbers[4] = grant_n[(g) * 2 + 1];
#endif
#endif
  skip
}
#ifdef BOOKS_UNNUMBERED         /* control: what was granted anew meanwhile is struck out, too */
#define SAME(number, which) true
#else
#define SAME(number, which) ((number) == (which))
#endif
inline strike_out(g) {          /* the kernel has forgotten: what was taken leaves the books, unless granted anew */
#if defined(BOOKS) && !defined(BOOKS_EMPTIED)
  if :: inodes & 1 && SAME(numbers[0], grant_a[(g) * 3]) -> book_a[g] = book_a[g] & ~1 :: else fi;
  if :: inodes & 2 && SAME(numbers[1], grant_a[(g) * 3 + 1]) -> book_a[g] = book_a[g] & ~2 :: else fi;
  if :: inodes & 4 && SAME(numbers[2], grant_a[(g) * 3 + 2]) -> book_a[g] = book_a[g] & ~4 :: else fi;
  if :: names & 1 && SAME(numbers[3], grant_n[(g) * 2]) -> book_n[g] = book_n[g] & ~1 :: else fi;
  if :: names & 2 && SAME(numbers[4], grant_n[(g) * 2 + 1]) -> book_n[g] = book_n[g] & ~2 :: else fi;
  numbers[0] = 0; numbers[1] = 0; numbers[2] = 0; numbers[3] = 0; numbers[4] = 0;
#endif
  skip
}
#ifdef ONE_KEY
#define NAMES_KEYS(keys) (keys)
#else
#define NAMES_KEYS(keys) ((keys) & ~7)
#endif

/* ======================= daemon: messages ======================= */
proctype Net(byte g) {
  byte k;
end: do
  :: d_step { m_old[g] -> sharer[g] = sharer[g] | m_old[g]; m_old[g] = 0 }
#ifdef REGISTER_OVERTAKES       /* control: a later REGISTER before an earlier RELEASE */
  :: d_step { m_reg[g] ->
#else
  :: d_step { m_reg[g] && !(m_reg[g] & m_rel[g]) ->
#endif
       sharer[g] = sharer[g] | m_reg[g]; m_conf[g] = m_conf[g] | m_reg[g]; m_reg[g] = 0 }
  :: d_step { m_rel[g] -> sharer[g] = sharer[g] & ~m_rel[g]; m_rel[g] = 0 }
  od
}

/* ======================= a change ======================= */
inline begin_slot(s) {
  d_step { if :: changed & (1 << s) -> infl[SLOT(s)]++; if :: infl[SLOT(s)] == 1 -> word[SLOT(s)]++ :: else fi :: else fi }
}
inline end_slot(s) {
  d_step { if :: changed & (1 << s) -> infl[SLOT(s)]--; if :: infl[SLOT(s)] == 0 -> word[SLOT(s)]++ :: else fi :: else fi }
}
inline last_of(g, k) { if :: keys & (1 << k) -> until[g] = MAX(until[g], last[g * NK + k]) :: else fi }
inline note(g, k) { if :: hit & (1 << k) -> last[g * NK + k] = sent[g] :: else fi }
inline recall(g) {
  d_step {
    until[g] = 0;
#ifdef ORIGIN_LEFT_OUT          /* control: the origin is believed to have recalled itself */
    if :: o == g -> sharer[g] = sharer[g] & ~keys :: else fi;
#endif
    hit = sharer[g] & keys;
#ifdef SECOND_SLOT_FORGOTTEN
    hit = hit & ~(A(C) | N(C));
#endif
    if
    :: hit ->
       sent[g]++;
       sharer[g] = sharer[g] & ~hit;
       m_recall[g] = m_recall[g] | hit;
#ifdef ONE_KEY
       if :: op >= UNLINK -> m_names[g] = true :: else fi;
#endif
       note(g, 0); note(g, 1); note(g, 2); note(g, 3); note(g, 4)
#ifdef OWN_RECALLS_ONLY         /* control: recalls sent by overlapping changes are not counted */
       ; until[g] = sent[g]
    :: else
    fi;
#else
    :: else
    fi;
#ifdef ALL_RECALLS              /* more than needed: everything that the guest owes */
    until[g] = sent[g];
#else
    last_of(g, 0); last_of(g, 1); last_of(g, 2); last_of(g, 3); last_of(g, 4);
#endif
#endif
    hit = 0
  }
}
inline give_up(g) {             /* FORGET_ROUND, control: a change that gives up takes its recalls out of the ledger */
#ifdef FORGET_ROUND
  k = 0;
  do :: k < NK -> if :: last[g * NK + k] == until[g] -> last[g * NK + k] = 0 :: else fi; k++ :: else -> break od;
  k = 0
#endif
  skip
}
inline look() {                 /* where does n lead, which slots and keys are concerned? */
  if
  :: op == CHMOD -> changed = 1 << C; keys = A(C); objects = OBJ_C
  :: op == CHMOD_D -> changed = 1 << D; keys = A(D); objects = OBJ_D
  :: op == CREATE -> changed = 1 << P; keys = A(P); objects = OBJ_P
  :: op == UNLINK && leads[0] != NOTHING ->
     changed = 1 << P | 1 << leads[0]; objects = OBJ_P | 1 << leads[0] | OBJ_N;
     keys = A(P) | A(leads[0]) | N(leads[0])
  :: op == RENAME && leads[0] == C && leads[1] == D ->
     changed = 7; objects = OBJ_P | OBJ_C | OBJ_D | OBJ_N | OBJ_M;
     keys = A(P) | A(C) | A(D) | N(C) | N(D)
  :: else -> changed = 0        /* ENOENT */
  fi;
#ifdef NO_NAMES_KEY
  keys = keys & 7
#endif
}
inline apply() {
  applied++; mine = applied; touched[mine] = objects;
  if :: objects & OBJ_P -> attr_of[P] = mine :: else fi;
  if :: objects & OBJ_C -> attr_of[C] = mine :: else fi;
  if :: objects & OBJ_D -> attr_of[D] = mine :: else fi;
  if
  :: op == UNLINK -> leads[0] = NOTHING; name_of[0] = mine
  :: op == RENAME -> leads[0] = D; leads[1] = NOTHING; name_of[0] = mine; name_of[1] = mine
  :: else
  fi
}
#define ON_NAMES (op >= CREATE)

proctype Writer(byte op; byte o) {
  byte changed, keys, objects, until[NG], hit, mine, inodes, names, numbers[5], self, k;
  bool done, moves;
  /* ---- the origin's agent: self-recall, then forward ---- */
  if
  :: o < NG ->
#ifndef NO_SELF_RECALL
     d_step { !lock[o] ->
       if                       /* what it knows of itself: the books, for the names */
       :: op == CHMOD -> self = A(C); own[o * 3 + C]++
       :: op == CHMOD_D -> self = A(D); own[o * 3 + D]++
       :: op == CREATE -> self = A(P); own[o * 3 + P]++
       :: op == UNLINK -> self = A(P); own[o * 3 + P]++;
          if :: k_name[o] & 1 -> self = self | A(k_leads[o * 2]) | N(k_leads[o * 2]) :: else fi
       :: op == RENAME -> self = A(P); own[o * 3 + P]++;
          if :: k_name[o] & 1 -> self = self | A(k_leads[o * 2]) | N(k_leads[o * 2]) :: else fi;
          if :: k_name[o] & 2 -> self = self | A(k_leads[o * 2 + 1]) | N(k_leads[o * 2 + 1]) :: else fi
       fi;
       moves = (op == RENAME && (k_name[o] & 2));
       take(o, self, true);
       self = self & reg[o];
       unregister(o, self) };
#ifdef RELEASE_FIRST            /* control: RELEASE before the kernel has dropped */
     d_step { m_rel[o] = m_rel[o] | self; self = 0 };
#endif
#ifndef RELEASE_UNDROPPED
     d_step { forget_attributes(o, inodes) };
     d_step { forget_names(o, names) };
#endif
     d_step { strike_out(o); m_rel[o] = m_rel[o] | self; self = 0; inodes = 0; names = 0 };
#endif
  :: else
  fi;
  /* ---- the export ---- */
#ifdef NO_DIRECTORY_LOCK        /* control: where n leads is looked up before, and the directory not held */
  d_step { look() };
#else
  d_step { !ON_NAMES || !dir_held -> if :: ON_NAMES -> dir_held = true :: else fi; look() };
#endif
  if
  :: changed ->
#ifdef BEGIN_AT_ONCE
     d_step { begin_slot(0); begin_slot(1); begin_slot(2) };
#elif defined(BEGIN_AFTER_RECALL) /* control: one slot is begun when the sharers have been read */
     begin_slot(0); begin_slot(2);
#else
     begin_slot(0); begin_slot(1); begin_slot(2);
#endif
     recall(0);
#if NG > 1
     recall(1);
#endif
#ifdef BEGIN_AFTER_RECALL
     begin_slot(1);
#endif
     done = true;
     if
     :: acked[0] >= until[0]
#ifdef INTERRUPTED
     :: d_step { acked[0] < until[0] -> done = false; give_up(0) }
#endif
     fi;
#if NG > 1
     if
     :: !done || acked[1] >= until[1]
#ifdef INTERRUPTED
     :: d_step { done && acked[1] < until[1] -> done = false; give_up(1) }
#endif
     fi;
#endif
#ifdef END_EARLY                /* control: one slot is even again before the change is applied */
     end_slot(1);
#endif
     d_step { if :: done -> apply() :: else fi };
     end_slot(0);
#ifndef END_EARLY
     end_slot(1);
#endif
     end_slot(2)
  :: else
  fi;
#ifdef RENAME_MOVES             /* control: the kernel moves what it has of m, with its time, to n */
  d_step { if :: moves && mine -> k_name[o] = k_name[o] | 1; k_leads[o * 2] = D; k_name_of[o * 2] = mine :: else fi };
#endif
  d_step {
    known = MAX(known, mine); moves = false;
    if :: ON_NAMES -> dir_held = false :: else fi;
    changed = 0; keys = 0; objects = 0; until[0] = 0; mine = 0; done = false;
#if NG > 1
    until[1] = 0;
#endif
#ifndef NO_SELF_RECALL
    if
    :: o < NG && op == CHMOD -> own[o * 3 + C]--
    :: o < NG && op == CHMOD_D -> own[o * 3 + D]--
    :: o < NG && ON_NAMES -> own[o * 3 + P]--
    :: else
    fi
#endif
  }
}

/* ======================= guest: recall thread ======================= */
proctype Recall(byte g) {
  byte serial, keys, inodes, names, numbers[5];
  bool names_too;
end: do
  :: d_step { m_recall[g] ->
       serial = sent[g]; keys = m_recall[g]; m_recall[g] = 0; names_too = m_names[g]; m_names[g] = false
#if !defined(ONE_KEY) || defined(ONE_KEY_DROPS_ALL)
       ; names_too = true
#endif
     };
     d_step { !lock[g] -> unregister(g, keys); take(g, NAMES_KEYS(keys) | (keys & 7), names_too) };
     d_step { forget_attributes(g, inodes) };
     d_step { forget_names(g, names) };
#ifdef BOOKS
     d_step { strike_out(g) };
#endif
     d_step { acked[g] = MAX(acked[g], serial); serial = 0; keys = 0; inodes = 0; names = 0; names_too = false }
  od
}

/* ======================= guest: reader (application, kernel, agent) ======================= */
inline starts(object) {         /* what must it at least return? */
  i = known;
  do :: i > 0 && !(touched[i] & (object)) -> i-- :: else -> break od;
  least = i; i = 0
}
inline returns() {
  assert(x >= least);
  known = MAX(known, x); n++;
  x = 0; v = 0; s = 0; i = 0; least = 0; ok = false; to = 0
}
inline take_confirmations(g) { reg[g] = reg[g] | m_conf[g]; m_conf[g] = 0 }
inline send_register(key, s) {
#ifdef REGISTER_IN_FLIGHT       /* right, and slower: registering while an own change is in flight */
  if :: !(reg[g] & (key)) && !(m_reg[g] & (key)) && !(m_conf[g] & (key)) -> m_reg[g] = m_reg[g] | (key) :: else fi
#else
  if :: !own[g * 3 + s] && !(reg[g] & (key)) && !(m_reg[g] & (key)) && !(m_conf[g] & (key)) -> m_reg[g] = m_reg[g] | (key)
     :: else fi
#endif
}
#ifdef REGISTER_IN_FLIGHT
#define NO_OWN(s) true
#else
#define NO_OWN(s) (!own[g * 3 + (s)])
#endif
#ifdef CONFIRM_ANY_TIME         /* control: confirmed after the word was read */
#define GRANT_SECTION d_step { !lock[g] -> lock[g] = true }
#define CONFIRM_NOW take_confirmations(g)
#else
#define GRANT_SECTION d_step { !lock[g] -> lock[g] = true; take_confirmations(g) }
#define CONFIRM_NOW skip
#endif

proctype Reader(byte g) {
  byte n, s, i, x, v, to, least;
  bool ok;
  do
  :: n < NR ->
     if
     :: READS & OBJ_P -> s = P
     :: READS & OBJ_C -> s = C
     :: READS & OBJ_D -> s = D
     :: READS & OBJ_N -> s = 3
     :: READS & OBJ_M -> s = 4
     fi;
     if
     :: s < 3 ->                                           /* attributes */
        if
        :: d_step { k_attr[g] & (1 << s) -> starts(1 << s); x = k_attr_of[g * 3 + s]; returns() }
        :: d_step { !(k_attr[g] & (1 << s)) -> starts(1 << s); v = word[SLOT(s)] };
           d_step { x = attr_of[s]; send_register(A(s), s) };
           GRANT_SECTION;
           ok = (EVEN(v) && word[SLOT(s)] == v);
           d_step {
             CONFIRM_NOW;
             if
             :: ok && (reg[g] & A(s)) && NO_OWN(s) ->
                k_attr[g] = k_attr[g] | (1 << s); k_attr_of[g * 3 + s] = x;
#ifdef BOOKS
                grants[g]++; grant_a[g * 3 + s] = grants[g]; book_a[g] = book_a[g] | (1 << s)
#endif
             :: else
             fi;
             lock[g] = false; returns() }
        fi
     :: else ->                                            /* a name */
        s = s - 3;
        if
        :: d_step { k_name[g] & (1 << s) -> starts(NAME_OBJ(s)); x = k_name_of[g * 2 + s]; returns() }
        :: d_step { !(k_name[g] & (1 << s)) -> starts(NAME_OBJ(s)); v = word[P] };
           d_step { x = name_of[s]; to = leads[s];
             if :: to != NOTHING -> send_register(N(to), to) :: else fi };
           GRANT_SECTION;
           ok = (EVEN(v) && word[P] == v && to != NOTHING);
#ifndef CHILD_UNCHECKED         /* the child's word must be even */
           ok = (ok && EVEN(word[SLOT(to)]));
#endif
           d_step {
             CONFIRM_NOW;
             if
             :: ok && (reg[g] & N(to)) && NO_OWN(P) && NO_OWN(to) ->
                k_name[g] = k_name[g] | (1 << s); k_leads[g * 2 + s] = to; k_name_of[g * 2 + s] = x;
#ifdef BOOKS
                grants[g]++; grant_n[g * 2 + s] = grants[g]; book_n[g] = book_n[g] | (1 << s)
#endif
             :: else
             fi;
             lock[g] = false; returns() }
        fi
     fi
  :: else -> break
  od
}

init {
  byte g;
  leads[1] = D;
  atomic {
    run Writer(W0, O0);
#ifdef W1
    run Writer(W1, O1);
#endif
#ifdef W2
    run Writer(W2, O2);
#endif
    g = 0;
    do
    :: g < NG -> run Net(g); run Recall(g); run Reader(g); g++
    :: else -> break
    od
  }
}
