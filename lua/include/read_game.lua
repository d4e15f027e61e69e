-- @include last_seen_scores
-- Read a game as it is stored: sid and body of each member, then in the same order the score in last_seen of each.
-- One flat table, the one that HGETALL gave: to make another, or one in the other, costs more than the commands.
local function read_game(game_conns_key, last_seen_key)
  local members = redis.call('HGETALL', game_conns_key)
  local sids = {}
  for index = 1, #members, 2 do
    sids[#sids + 1] = members[index]
  end
  local count = #members
  for index, score in ipairs(last_seen_scores(last_seen_key, sids)) do
    members[count + index] = score
  end
  return members
end
