/* strict.pml: one slot of the strict protocol, with leases, sessions, faults and the end of a daemon.
 *
 * Several slots in one change, names, and guests that make changes themselves are in keys.pml. One daemon D (writers W,
 * message handling in Net), NG guests, each with a kernel cache, a user cache (the agent's) and a recall thread; a clock
 * that ages leases. The cached object is a counter, so "linearizable" means: a read returns at least the largest value
 * acknowledged (REG), or acknowledged or returned (LIN), before it began.
 *
 * Every message is a mailbox that is emptied at any later time, so messages are delayed and REORDERED freely. One
 * Promela step is one memory access of an implementation, or one section under a lock that nobody sees half-way.
 *
 * Sizes:      NG guests, NR0/NR1 reads by the reader of guest 0/1 (+1 each at quiescence), NW writers, NM mutations each,
 *             L lease in ticks, NREN renewals per guest (255: without bound)
 * Features:   AV        the kernel drops a fill that raced an invalidation (and fills late, i.e. after the agent's reply
 *                       left the grant lock)
 *             LATEFILL  the kernel fills late, but does NOT drop raced fills
 *                       (neither: the fill is complete before the grant lock is released)
 *             HANG      the recall thread of guest 0 may stop for ever
 *             DIE       the agent of guest 0 may be killed; its kernel's cache survives. KEEPER: its keeper cleans the
 *                       kernel and says goodbye
 *             CUT       the control channel of guest 0 may be cut once; it says hello again
 *             RESTART   D may crash NCRASH times, at any step, and restart. JOURNAL: its successor knows who may hold
 *                       grants, and guests say hello to it; NEWTABLE: it has another table
 * Properties: LIN, REG, FRESH are assertions; besides that every process comes to its end (no invalid end state)
 */
#ifndef NG
#define NG 2
#endif
#ifndef NR0
#define NR0 1
#endif
#ifndef NR1
#define NR1 2
#endif
#ifndef NW
#define NW 1
#endif
#ifndef NM
#define NM 2
#endif
#ifndef L
#define L 2
#endif
#ifndef NREN
#define NREN 0
#endif
#ifndef MARGIN
#define MARGIN 0                /* D waits L + MARGIN */
#endif
#define DL (L + MARGIN)
#ifndef TRUST
#define TRUST 1                 /* ticks that an agent may use a table whose daemon is dead */
#endif
#ifndef NCRASH
#define NCRASH 1
#endif
#if defined(CUT) || defined(JOURNAL)    /* agents say hello again; otherwise a RENEW opens a new session by itself */
#define SESSIONS
#endif
#define EVEN(w) (((w) & 1) == 0)

/* ---- shared memory: written by D only, read by every guest ---- */
byte word, epoch;
/* ---- the truth, and the specification's observer ---- */
byte val, acked, maxret, wdone;
/* ---- D, private ---- */
bool up = true;
byte infl, grace, hold, inc;          /* changes in flight; ticks until changes may be made; incarnation */
bool sharer[NG], live[NG];      /* live: D has a session for this guest */
byte rs[NG], ra[NG];            /* recalls sent to g / acknowledged by g (cumulative) */
byte dl[NG];                    /* lease left, as D counts it */
byte asked[NG], owed[NG];       /* a RENEW that is not answered yet: the lease it asked for; recalls sent before it */
/* ---- messages under way ---- */
/* REGISTER and CONFIRM carry the guest's registration generation, which every recall and every
   new session bumps.  Only "same generation or not" matters, so the model keeps: 1 = current,
   2 = its generation is over. */
byte m_reg[NG], m_conf[NG], m_cep[NG];   /* REGISTER, CONFIRM, the epoch in the CONFIRM */
byte m_ren[NG], age[NG], nren[NG];       /* 1 RENEW, 4 noticed by D, 2 reply, 3 HELLO; lease counted from sending */
bool m_new[NG];                          /* the reply opens a new session */
bool jour[NG], owes[NG];        /* JOURNAL: may hold grants; has not returned to this daemon yet */
/* ---- guest agent ---- */
bool dead[NG], cut[NG];         /* DIE: killed; SESSIONS: its channel is gone (it notices later) */
bool withdrawn[NG];             /* SESSIONS: it does not trust its table until its next session */
byte tab[NG];                   /* NEWTABLE: which table it reads, as a number that rises */
bool frozen[NG]; byte fword[NG], trust[NG];    /* that table's daemon is dead; its word; ticks that it is trusted */
bool glock[NG], reg[NG];        /* grant lock; registered */
byte regep[NG], gl[NG];         /* epoch of the registration; lease left, as the guest counts it */
bool uhold[NG]; byte uval[NG], uver[NG], uep[NG];
/* ---- guest kernel: entry valid while kttl > 0 ---- */
byte kval[NG], kttl[NG];
bool raced[NG+1];               /* an invalidation came since reader r's request left the kernel */
byte ft[NG+1];                  /* TTL of a reply on its way into the kernel, per reader */
byte fa[NG+1];                  /* RELTTL: ticks since the agent computed that TTL */
bool known[NG];                 /* UNKNOWN: the kernel has the inode */
bool kdir[NG];                  /* DIRLOCK: directory lock held by a mutation from this guest */

#define MAX(a,b) ((a) > (b) -> (a) : (b))
inline unregister(g) {          /* under the grant lock; ends the registration generation */
  reg[g] = false;
  if :: m_reg[g] == 1 -> m_reg[g] = 2 :: else fi;
  if :: m_conf[g] == 1 -> m_conf[g] = 2 :: else fi
}
inline leave(g) {               /* D: nothing is waited for any more on this guest's account */
  live[g] = false; sharer[g] = false; ra[g] = rs[g]; jour[g] = false;
}
inline kernel_invalidate(g) {
  kttl[g] = 0; kval[g] = 0;
#ifdef UNKNOWN                  /* the kernel can only mark inodes that it has */
  raced[g] = known[g];
#elif defined(AV)
  raced[g] = true;
#endif
}

#ifdef SESSIONS
#define HANG_UP(g) cut[g] = true
#else
#define HANG_UP(g) skip
#endif

/* ======================= D: a mutation ======================= */
#ifdef RESTART
#define VOLATILE unless { inc != my }
#else
#define VOLATILE
#endif

inline word_begin() {           /* (1) */
#ifdef PARITY                   /* control: no in-flight count */
  word++
#elif defined(NOBIT)            /* control: one bump, before */
  word = word + 2
#elif defined(NOBIT_END)        /* control: one bump, after */
  skip
#else
  d_step { infl++; if :: infl == 1 -> word++ :: else fi }
#endif
}
inline word_end() {             /* (4) */
#ifdef PARITY
  word++
#elif defined(NOBIT)
  skip
#elif defined(NOBIT_END)
  word = word + 2
#else
  d_step { infl--; if :: infl == 0 -> word++ :: else fi }
#endif
}
inline recall_send(g) {         /* (2) first half, per guest */
  d_step {
    if
    :: sharer[g] -> rs[g]++;
#ifndef RM_AT_ACK
       sharer[g] = false;       /* leaves the set when the recall is SENT */
#endif
#ifdef OWN_RECALLS_ONLY         /* control: wait only for recalls that this mutation sent */
       t[g] = rs[g]
    :: else -> t[g] = 0
#else
    :: else
#endif
    fi;
#ifndef OWN_RECALLS_ONLY
    t[g] = rs[g]                /* wait also for what an overlapping mutation has sent */
#endif
  }
}
inline recall_wait(g) {         /* (2) second half */
#ifndef PROMPT
  if
  :: d_step { ra[g] >= t[g];
#ifdef RM_AT_ACK                /* the set loses g when its ACK arrives */
       if :: t[g] > 0 -> sharer[g] = false :: else fi;
#endif
     }
#ifdef NOEXPIRE                 /* leases never end: progress must not depend on that */
  :: false -> d_step {
#elif defined(NOLEASEWAIT)      /* control: evict without waiting */
  :: d_step { ra[g] < t[g];
#else
  :: d_step { ra[g] < t[g] && dl[g] == 0;
#endif
       leave(g); HANG_UP(g) }                                   /* evict */
  fi
#else
  skip
#endif
}
inline apply() { d_step { val++; mine = val } }                    /* (3) */
inline recall_all() {
  recall_send(0);
#if NG > 1
  recall_send(1);
#endif
  recall_wait(0);
#if NG > 1
  recall_wait(1);
#endif
}

#ifdef DIRLOCK                  /* the mutation comes from guest o, whose kernel holds the directory */
#define DIR_LOCK(o) d_step { !kdir[o] -> kdir[o] = true }
#define DIR_UNLOCK(o) kdir[o] = false
#else
#define DIR_LOCK(o) skip
#define DIR_UNLOCK(o) skip
#endif
#ifdef JOURNAL
#if NG > 1
#define RETURNED (!owes[0] && !owes[1])
#else
#define RETURNED (!owes[0])
#endif
#else
#define RETURNED false
#endif
proctype W(byte o) {
  byte i, my, mine, t[NG];
  do
  :: i < NM ->
     my = inc;
     {
       DIR_LOCK(o);
       d_step { up && hold == 0 && (grace == 0 || RETURNED); my = inc };
       word_begin();
#ifdef APPLY_FIRST
       apply(); recall_all();
#else
       recall_all(); apply();
#endif
       word_end();
       DIR_UNLOCK(o);
       d_step { acked = MAX(acked, mine) }                        /* (5) */
     } VOLATILE;
     d_step { i++; mine = 0; t[0] = 0;
#if NG > 1
       t[1] = 0
#endif
     }
  :: else -> break
  od;
  wdone++
}

/* ======================= D: crash and restart ======================= */
#ifdef RESTART
inline crashed(g) {
  sharer[g] = false; live[g] = false; dl[g] = 0; ra[g] = rs[g]; asked[g] = 0; owed[g] = 0;
  if :: m_ren[g] == 4 -> m_ren[g] = 1 :: else fi;
#ifdef JOURNAL
  owes[g] = jour[g]; cut[g] = true; m_ren[g] = 0; age[g] = 0; m_new[g] = false;
#ifdef JOURNAL_FRESH            /* control: each daemon begins an empty journal */
  jour[g] = false;
#endif
#endif
#ifdef NEWTABLE
  if :: !frozen[g] -> frozen[g] = true; fword[g] = word; trust[g] = TRUST :: else fi;
#endif
  skip
}
proctype Crash() {
  byte crashes;
  do
  :: crashes == NCRASH || wdone == NW -> break
  :: d_step { crashes < NCRASH && up && wdone < NW -> crashes++; up = false; inc++; infl = 0; grace = 0; hold = 0; crashed(0);
#if NG > 1
       crashed(1)
#endif
     };
#ifdef EPOCH_IN_WORD            /* epoch = high bits of every word; words go forward only */
     d_step { epoch = epoch + 1; word = epoch * 16 };
#elif defined(KEEPWORDS)        /* words survive; an odd one is rounded up; plain epoch */
     word = (word | 1) + 1;
#ifndef NOEPOCH
     epoch++;
#endif
#elif defined(NEWTABLE)         /* other memory; nobody reads it before its reply to a HELLO */
     word = 0;
#elif defined(EPOCH_FIRST)      /* words are reset; plain epoch, bumped before */
     epoch++; word = 0;
#elif defined(EPOCH_LAST)       /* words are reset; plain epoch, bumped after */
     word = 0; epoch++;
#elif defined(NOEPOCH)          /* control */
     word = 0;
#else                           /* words are reset; epoch is odd meanwhile */
     epoch++; word = 0; epoch++;
#endif
     d_step {
#ifndef NOGRACE
       grace = DL;
#endif
#ifdef HOLD
       hold = TRUST;
#endif
       up = true }
  od
}
#endif

/* ======================= the agent of guest 0 is killed, or its channel is cut ======================= */
inline lose(g) {                /* D: its connection is gone, and it said no goodbye */
#if defined(LOST_LEAVES) || defined(DEATH_LEAVES)       /* controls: D lets it go */
  leave(g)
#elif defined(IDLE_LEAVES)      /* D lets it go if it has no key, and owes no ack */
  if :: !sharer[g] && ra[g] == rs[g] -> leave(g) :: else fi
#else
  skip
#endif
}
#ifdef DIE
proctype Killer() {
  if
  :: d_step { !glock[0] && wdone < NW -> dead[0] = true };
#ifdef GOODBYE_FIRST    /* control: the keeper says goodbye before the kernel is clean */
     d_step { leave(0) };
     d_step { kernel_invalidate(0) }
#elif defined(KEEPER)
     d_step { kernel_invalidate(0) };
     d_step { leave(0) }
#else                           /* there is no keeper */
     d_step { lose(0) }
#endif
  :: wdone == NW
  fi
}
#endif
#ifdef CUT
proctype Cutter() {
  if
  :: d_step { !cut[0] && wdone < NW -> cut[0] = true; lose(0) }
  :: wdone == NW
  fi
}
#endif
#ifdef SESSIONS                 /* the agent notices, stops granting, drops, says hello again */
inline stop_granting(g) {
  d_step { !glock[g] -> unregister(g); gl[g] = 0;
    m_ren[g] = 0; age[g] = 0; m_new[g] = false;    /* what was under way on that connection is void, a WELCOME too */
#ifndef TRUST_ON                /* control: the user cache is used until its trust runs out */
    withdrawn[g] = true
#endif
  }
}
proctype Loss(byte g) {
end: do
  :: cut[g] ->
#ifdef DROP_THEN_STOP           /* control: what is granted between the two steps stays */
     d_step { kernel_invalidate(g) };
     stop_granting(g);
#elif defined(HELLO_UNDROPPED)  /* control */
     stop_granting(g);
#else
     stop_granting(g);
     d_step { kernel_invalidate(g) };
#endif
     d_step { up -> cut[g] = false; age[g] = L; m_ren[g] = 3; m_new[g] = false };
#ifdef HELLO_UNDROPPED
     d_step { kernel_invalidate(g) }
#endif
  od
}
#endif

/* ======================= messages, handled by D or by the agent ======================= */
#ifdef RENEW_OWED               /* control: a lease is renewed although an ack is owed */
#define MAY_RENEW(g) true
#else                           /* it owes nothing from before it asked */
#define MAY_RENEW(g) (ra[g] >= owed[g])
#endif
inline net(g) {
  if
  :: d_step { m_reg[g] > 0 && up ->                  /* D: REGISTER, even while odd */
       if :: live[g] -> sharer[g] = true; m_conf[g] = m_reg[g]; m_cep[g] = epoch
          :: else fi;
       m_reg[g] = 0 }
#if NREN > 0
#if NREN == 255
  :: d_step { m_ren[g] == 0 && wdone < NW -> age[g] = L; m_ren[g] = 1 }
#else
  :: d_step { m_ren[g] == 0 && nren[g] < NREN -> nren[g]++; age[g] = L; m_ren[g] = 1 }
#endif
#endif
#if NREN > 0
  :: d_step { m_ren[g] == 1 && live[g] && up -> asked[g] = DL; owed[g] = rs[g]; m_ren[g] = 4 }    /* D: RENEW */
  :: d_step { m_ren[g] == 4 && live[g] && up && MAY_RENEW(g) ->      /* D: RENEWED */
       dl[g] = MAX(dl[g], asked[g]); asked[g] = 0; owed[g] = 0; m_ren[g] = 2 }
  :: d_step { m_ren[g] == 4 && !live[g] && up -> asked[g] = 0; owed[g] = 0; m_ren[g] = 1 }
#endif
#if NREN > 0 || defined(SESSIONS)
  :: d_step { (m_ren[g] == 1 && !live[g] || m_ren[g] == 3) && up ->              /* D: HELLO */
       if
#ifdef SESSIONS
       :: m_ren[g] == 1 -> age[g] = 0                /* no such session; it is told to say hello */
#endif
       :: else -> live[g] = true; sharer[g] = false; ra[g] = rs[g]; dl[g] = DL; m_new[g] = true;
          owes[g] = false;
#ifdef JOURNAL_LATE             /* control: the journal is written after the WELCOME */
          jour[g] = false
#else
          jour[g] = true
#endif
       fi;
       m_ren[g] = 2 }
#ifdef JOURNAL_LATE
  :: d_step { live[g] && !jour[g] -> jour[g] = true }
#endif
  :: d_step { m_ren[g] == 2 && !glock[g] && !dead[g] ->      /* agent: reply, under the grant lock */
       if :: m_new[g] -> m_new[g] = false; withdrawn[g] = false;
#ifdef NEWTABLE
             if :: frozen[g] -> frozen[g] = false; fword[g] = 0; trust[g] = 0; tab[g]++;
                   uhold[g] = false; uval[g] = 0; uver[g] = 0; uep[g] = 0
                :: else
             fi;
#endif
#ifndef KEEP_REG
             unregister(g)
#endif
          :: else fi;
#ifdef LEASE_FROM_RECEIPT
       gl[g] = L;
#else
       gl[g] = MAX(gl[g], age[g]);
#endif
       age[g] = 0; m_ren[g] = 0 }
#endif
  fi
}
proctype Net(byte g) {
end: do :: net(g) od
}

/* ======================= time ======================= */
#define DEC(c) if :: c > 0 -> c-- :: else fi
#define RUNS(g) (gl[g] > 0 || trust[g] > 0 || dl[g] > 0 || kttl[g] > 0 || age[g] > 0 || asked[g] > 0 || (ft[g] > 0 RELT))
#ifdef RELTTL
#define RELT && false
#else
#define RELT
#endif
#if defined(RELTTL) && MARGIN > 0       /* assumption: check-to-fill takes at most MARGIN ticks */
#define IN_TIME(r) (ft[r] == 0 || fa[r] < MARGIN)
#else
#define IN_TIME(r) true
#endif
proctype Clock() {
end: do
  :: d_step { (grace > 0 || hold > 0 || RUNS(0) || RUNS(NG-1)) && IN_TIME(0) && IN_TIME(NG-1) ->
#if defined(RELTTL) && MARGIN > 0
       if :: ft[0] > 0 -> fa[0]++ :: else fi;
#if NG > 1
       if :: ft[1] > 0 -> fa[1]++ :: else fi;
#endif
#endif
       DEC(grace); DEC(hold); DEC(gl[0]); DEC(dl[0]); DEC(asked[0]); DEC(age[0]); DEC(kttl[0]); DEC(trust[0]);
       if :: kttl[0] == 0 -> kval[0] = 0 :: else fi;
#if NG > 1
       DEC(gl[1]); DEC(dl[1]); DEC(asked[1]); DEC(age[1]); DEC(kttl[1]); DEC(trust[1]);
       if :: kttl[1] == 0 -> kval[1] = 0 :: else fi;
#endif
#ifndef RELTTL                  /* control: the TTL in a reply is relative to its arrival */
       DEC(ft[0]); DEC(ft[1]);
#if NG > 1
       DEC(ft[2]);
#endif
#endif
     }
  od
}

/* ======================= guest: recall thread ======================= */
proctype Recall(byte g) {
  byte s;
#ifdef DIE
  {
#endif
end: do
    :: d_step { s != rs[g] && !cut[g] -> s = rs[g] };
       d_step { !glock[g] -> unregister(g) };                      /* under the grant lock */
#ifdef ACK_FIRST
       ra[g] = MAX(ra[g], s);
#endif
#ifdef DIRLOCK                  /* FUSE_NOTIFY_INVAL_ENTRY takes the directory's lock */
       d_step { !kdir[g] -> kernel_invalidate(g) };
#else
       d_step { kernel_invalidate(g) };
#endif
#ifndef ACK_FIRST
       d_step { if :: !cut[g] -> ra[g] = MAX(ra[g], s) :: else fi }
#endif
#ifdef HANG
    :: g == 0 -> break
#endif
    od
#ifdef DIE
  } unless { dead[g] }
#endif
}

/* ======================= guest: a reader (application + kernel + agent thread) ============= */
#ifdef PROMPT                   /* quiescence of the prompt mode: all recalls are delivered */
#define QUIET(g) (wdone == NW && ra[g] == rs[g])
#else
#define QUIET(g) (wdone == NW)
#endif
inline begin() {                /* the read begins: what must it at least return? */
#if defined(LIN)
  lo = MAX(acked, maxret)
#elif defined(REG)
  lo = acked
#else
  skip
#endif
}
inline finish() {               /* the read ends */
#if defined(LIN) || defined(REG)
  assert(x >= lo);
#endif
#ifdef FRESH
  assert(n < nr || x == val);
#endif
#ifdef LIN
  maxret = MAX(maxret, x);
#endif
  n++; x = 0; v = 0; e = 0; lo = 0; ok = false; kn = false; ft[r] = 0; raced[r] = false; fa[r] = 0
}
#if defined(KEEPWORDS) || defined(EPOCH_FIRST) || defined(EPOCH_LAST)
#define EVENEP(e) true
#else
#define EVENEP(e) EVEN(e)
#endif
#ifdef NEWTABLE                 /* the word of the table that the agent has; odd if it is not trusted any more */
#define OF_TABLE(g) (frozen[g] -> (trust[g] > 0 -> fword[g] : 1) : word)
#else
#define OF_TABLE(g) word
#endif
#ifdef SESSIONS
#define SEEN (withdrawn[g] -> 1 : OF_TABLE(g))
#else
#define SEEN OF_TABLE(g)
#endif
inline sample() {
#ifdef NEWTABLE
  d_step { e = tab[g]; v = SEEN }
#elif defined(RESTART) && !defined(EPOCH_IN_WORD)
  e = epoch; v = SEEN;
  if :: epoch != e || !EVENEP(e) -> v = 1 :: else fi  /* epoch moved: as if odd */
#else
  v = SEEN
#endif
}
#ifdef RESTART
#define EPOCH_OK (uep[g] == e)
#else
#define EPOCH_OK true
#endif
#ifdef EPOCH_IN_WORD
#define REG_EPOCH_OK (regep[g] == v / 16)
#elif defined(NEWTABLE)
#ifdef ANY_TABLE                /* control: equal words of two tables are taken for the same */
#define REG_EPOCH_OK true
#else
#define REG_EPOCH_OK (tab[g] == e)
#endif
#elif defined(RESTART)
#define REG_EPOCH_OK (regep[g] == e && epoch == e)
#else
#define REG_EPOCH_OK true
#endif
#ifdef KNOWN_ONLY               /* rule: grant only on requests that name an inode the kernel has */
#define KNOWN_OK kn
#else
#define KNOWN_OK true
#endif
#ifdef EARLY_GRANT              /* control: registration not yet confirmed */
#define REG_OK (reg[g] || m_reg[g] > 0)
#else
#define REG_OK reg[g]
#endif

proctype Reader(byte g; byte r; byte nr) {
  byte x, v, e, lo, n; bool ok, kn;
next:
  do
  :: n < nr || (n == nr && QUIET(g)) ->
     if
     :: d_step { kttl[g] > 0 -> begin(); x = kval[g]; finish() }       /* kernel cache hit */
     :: d_step { kttl[g] == 0 -> begin(); raced[r] = false;            /* miss: ask the agent */
          kn = known[g] };
#ifdef SAMPLE_AFTER
        d_step { up -> x = val }; sample();
        d_step { if :: EVEN(v) -> uhold[g] = true; uval[g] = x; uver[g] = v; uep[g] = e :: else fi };
#else
        sample();
        if
        :: d_step { EVEN(v) && uhold[g] && uver[g] == v && EPOCH_OK -> x = uval[g] }
        :: else ->
           d_step { up -> x = val;                                    /* fetch from D */
             if :: EVEN(v) -> uhold[g] = true; uval[g] = x; uver[g] = v; uep[g] = e
                :: else fi }
        fi;
#endif
        d_step { if :: !reg[g] && m_reg[g] == 0 -> m_reg[g] = 1 :: else fi };
        /* grant section */
        if
#ifdef DIE
        :: d_step { dead[g] -> n++; x = 0; v = 0; e = 0; lo = 0; kn = false }; goto next   /* ENOTCONN */
#endif
        :: d_step {
#ifndef NOLOCK
          !glock[g] && !dead[g] -> glock[g] = true;
#else
          !dead[g];
#endif
          if
#ifdef CONF_NOGEN               /* control: a CONFIRM is believed whenever it arrives */
          :: m_conf[g] > 0 -> reg[g] = true; regep[g] = m_cep[g]
#else
          :: m_conf[g] == 1 -> reg[g] = true; regep[g] = m_cep[g]
#endif
          :: else
          fi; m_conf[g] = 0; m_cep[g] = 0 }
        fi;
        ok = (SEEN == v && EVEN(v));                                  /* (i) */
        d_step { if :: ok && REG_OK && REG_EPOCH_OK && KNOWN_OK && gl[g] > 0 ->   /* (ii) (iii) */
                        ft[r] = gl[g]
                    :: else -> ft[r] = 0 fi };
#if defined(AV) || defined(LATEFILL)
#ifndef NOLOCK
        glock[g] = false;
#endif
        d_step {
#ifdef AV
          if :: raced[r] -> ft[r] = 0 :: else fi;
#endif
#ifdef UNKNOWN
          known[g] = true;
#endif
          if :: ft[r] > 0 -> kval[g] = x; kttl[g] = ft[r] :: else fi; finish() }
#else
        d_step { if :: ft[r] > 0 -> kval[g] = x; kttl[g] = ft[r] :: else fi;
          glock[g] = false; finish() }
#endif
     fi
  :: n > nr -> break
  od
}

init {
  byte g;
  d_step { g = 0; do :: g < NG -> live[g] = true; jour[g] = true; gl[g] = L; dl[g] = DL; g++ :: else -> break od; g = 0 };
  atomic {
    run W(0);
#if NW > 1
    run W(NG-1);
#endif
    run Net(0); run Recall(0); run Reader(0, 0, NR0);
#if NG > 1
    run Net(1); run Recall(1); run Reader(1, 1, NR1);
#endif
#ifdef SESSIONS
    run Loss(0);
#if NG > 1
    run Loss(1);
#endif
#endif
#ifdef DIE
    run Killer();
#endif
#ifdef CUT
    run Cutter();
#endif
#ifndef NOEXPIRE
    run Clock();
#endif
#ifdef RESTART
    run Crash();
#endif
  }
}
#ifdef LIVE
ltl writer_finishes { <> (wdone == NW) }
#endif
