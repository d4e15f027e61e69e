-- @include last_seen_scores
-- Read a game as it is stored: sid and body of each member, then in the same order the score in last_seen of each.
-- It is one flat table, the one that HGETALL gave: for two players, a second table adds a twentieth to the whole.
local function read_game(game_conns_key, last_seen_key)
  local members = redis.call('HGETALL', game_conns_key)
  local sids, count = {}, #members
  for index = 1, count, 2 do
    sids[(index + 1) / 2] = members[index]
  end
  local scores = last_seen_scores(last_seen_key, sids)
  for index = 1, #scores do
    members[count + index] = scores[index]
  end
  return members
end
